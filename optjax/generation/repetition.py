"""Score processors against repetition: of tokens, and of n-grams."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.options import Settings


def repetition_penalty(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    penalty, seen = settings.repetition_penalty, history.seen
    assert seen is not None  # kept where there is a penalty: see new_history
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Bans each token that would complete an n-gram the row holds already."""
    n, tokens = settings.no_repeat_ngram_size, history.tokens
    b, s = tokens.shape
    columns = jnp.arange(s)
    # An n-gram that ends in column c is complete where all of it is real and c is filled.
    ends = (columns >= history.first[:, None] + n - 1) & (columns < history.count)
    tail = jnp.take(tokens, history.count - jnp.arange(1, n), axis=1, mode="clip")
    for back in range(1, n):
        ends &= jnp.roll(tokens, back, axis=1) == tail[:, back - 1, None]
    long_enough = history.count - history.first >= n - 1
    banned = jnp.zeros(scores.shape, bool).at[jnp.arange(b)[:, None], tokens].max(ends & long_enough[:, None])
    return jnp.where(banned, NEVER, scores)
