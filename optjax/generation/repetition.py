"""Score processors against repetition: of tokens, and of n-grams."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.settings import Settings
from optjax.manual import as_after

# n-grams up to about this size are compared without a loop; of a long one each step by itself would take minutes to
# compile.
UNROLLED = 8


def encoder_repetition_penalty(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    assert history.prompt is not None  # kept where there is a penalty: see new_history
    return _penalize(scores, history.prompt, 1 / settings.encoder_repetition_penalty)


def repetition_penalty(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    assert history.seen is not None  # kept where there is a penalty: see new_history
    return _penalize(scores, history.seen, settings.repetition_penalty)


def _penalize(scores: jax.Array, ids: jax.Array, penalty: jax.Array) -> jax.Array:
    """Keskar et al. 2019, for the ids ``[B, V]`` bool."""
    return jnp.where(ids, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Bans each token that would complete an n-gram the row holds already."""
    return _ban_completions(settings.no_repeat_ngram_size, history, history.count, scores)


def encoder_no_repeat_ngram(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Bans each token that would complete an n-gram of the row's prompt."""
    return _ban_completions(settings.encoder_no_repeat_ngram_size, history, history.count - history.new, scores)


def _ban_completions(n: int, history: History, end: jax.Array, scores: jax.Array) -> jax.Array:
    """Of n-grams in the columns before ``end``."""
    tokens = history.tokens
    b, s = tokens.shape
    columns = jnp.arange(s)
    # An n-gram that ends in column c is complete where all of it is real and c is filled.
    ends = (columns >= history.first[:, None] + n - 1) & (columns < end)
    tail = jnp.take(tokens, history.count - jnp.arange(1, n), axis=1, mode="clip")

    def one_before(carry: tuple[jax.Array, jax.Array], token: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        before, ends = carry
        before = jnp.roll(before, 1, axis=1)
        return (before, ends & (before == token[:, None])), None

    if n > 1:
        carry = as_after(lambda carry: one_before(carry, tail[:, 0])[0], (tokens, ends))
        (_, ends), _ = jax.lax.scan(one_before, carry, tail.T, unroll=min(n - 1, UNROLLED))
    long_enough = history.count - history.first >= n - 1
    banned = jnp.zeros(scores.shape, bool).at[jnp.arange(b)[:, None], tokens].max(ends & long_enough[:, None])
    return jnp.where(banned, NEVER, scores)
