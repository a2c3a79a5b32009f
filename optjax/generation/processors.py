"""Score processors: pure functions that change the scores ``[B, V]`` of the next token.

They come in Hugging Face's order. Each one looks at its own setting, which is there: `process` leaves out those that
are off while tracing. To add one, add its option in `options.py`, write the function, and list it in `PROCESSORS` or
`WARPERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from optjax.generation.options import Settings
from optjax.generation.thresholds import kth_largest, mass_threshold

NEVER = -jnp.inf


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "first", "count", "new", "seen"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens that rows hold so far.

    Attributes:
      tokens: ``[B, S]``; a row's real tokens stand in columns ``first`` to ``count``, without gaps.
      first: ``[B]``, a row's first real column.
      count: int32 scalar, columns filled, the same for all rows.
      new: int32 scalar, tokens generated.
      seen: ``[B, V]`` bool, the ids that a row holds; None where no processor asks.
    """

    tokens: jax.Array
    first: jax.Array
    count: jax.Array
    new: jax.Array
    seen: jax.Array | None

    def append(self, token: jax.Array) -> History:
        """With one more token ``[B]`` in each row."""
        tokens = jax.lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.count, axis=1)
        rows = jnp.arange(token.shape[0])
        seen = None if self.seen is None else self.seen.at[rows, token].set(True)
        return History(tokens, self.first, self.count + 1, self.new + 1, seen)


def new_history(ids: jax.Array, mask: jax.Array, room: int, vocab_size: int, settings: Settings) -> History:
    """The history of prompts ``[B, T]`` whose real tokens stand at the right end, with room for more."""
    b, t = ids.shape
    seen = None
    if settings.repetition_penalty is not None:
        seen = jnp.zeros((b, vocab_size), bool).at[jnp.arange(b)[:, None], ids].max(mask)
    tokens = jnp.pad(ids, ((0, 0), (0, room)))
    return History(tokens, t - mask.sum(1, dtype=jnp.int32), jnp.int32(t), jnp.int32(0), seen)


def process(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Scores ``[B, V]`` after every processor that is on; what may not come is -inf."""
    for processor, option in PROCESSORS + (WARPERS if settings.do_sample else ()):
        value = getattr(settings, option)
        if value is not None and not (isinstance(value, int) and value == 0):
            with jax.named_scope(processor.__name__):
                scores = processor(settings, history, scores)
    return scores


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


def bad_words(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Bans the last id of each listed sequence where the row ends in the ids before it."""
    words = settings.bad_words
    width = words.shape[1]
    # The row's last width - 1 tokens, -2 where it is shorter than that, which matches nothing.
    columns = history.count - jnp.arange(width - 1, 0, -1)
    tail = jnp.take(history.tokens, columns, axis=1, mode="clip")
    tail = jnp.where(columns >= history.first[:, None], tail, -2)
    prefix = words[:, :-1]
    matches = ((tail[:, None] == prefix) | (prefix < 0)).all(-1)
    banned = jnp.zeros(scores.shape, bool).at[:, words[:, -1]].max(matches)
    return jnp.where(banned, NEVER, scores)


def min_new_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    without_eos = scores.at[:, settings.eos_ids].set(NEVER)
    return jnp.where(history.new < settings.min_new_tokens, without_eos, scores)


def suppress_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return jnp.where(settings.suppressed, NEVER, scores)


def temperature(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return scores / settings.temperature


def top_k(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Fan et al. 2018. Ties with the k-th score stay, as in transformers."""
    k = jnp.minimum(settings.top_k, scores.shape[-1])
    return jnp.where(scores >= kth_largest(scores, k), scores, NEVER)


def top_p(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Holtzman et al. 2020: keeps a token while the mass above it is less than top_p; ties stay together."""
    p = jax.nn.softmax(scores, axis=-1)
    return jnp.where(scores >= mass_threshold(scores, p, settings.top_p), scores, NEVER)


def min_p(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Nguyen et al. 2024."""
    p = jax.nn.softmax(scores, axis=-1)
    return jnp.where(p >= settings.min_p * p.max(-1, keepdims=True), scores, NEVER)


def typical_p(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Meister et al. 2022: the tokens whose surprise is nearest to the entropy, up to the mass typical_p."""
    log_p = jax.nn.log_softmax(scores, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(-1, keepdims=True)
    nearness = -jnp.abs(-log_p - entropy)
    return jnp.where(nearness >= mass_threshold(nearness, p, settings.typical_p), scores, NEVER)


Processor = Callable[[Settings, History, jax.Array], jax.Array]

PROCESSORS: tuple[tuple[Processor, str], ...] = (
    (repetition_penalty, "repetition_penalty"),
    (no_repeat_ngram, "no_repeat_ngram_size"),
    (bad_words, "bad_words"),
    (min_new_tokens, "min_new_tokens"),
    (suppress_tokens, "suppressed"),
)
WARPERS: tuple[tuple[Processor, str], ...] = (
    (temperature, "temperature"),
    (top_k, "top_k"),
    (top_p, "top_p"),
    (min_p, "min_p"),
    (typical_p, "typical_p"),
)
