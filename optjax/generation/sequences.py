"""Score processors for token sequences that a caller lists."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.settings import Settings


def sequence_bias(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Adds each bias to the score of its sequence's last id where the row ends in the ids before it."""
    words, bias = settings.sequence_bias
    added = jnp.where(_prefix_matches(words, history), bias, 0.0)
    return scores + jnp.zeros(scores.shape, scores.dtype).at[:, words[:, -1]].add(added)


def bad_words(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Bans the last id of each listed sequence where the row ends in the ids before it."""
    words = settings.bad_words
    banned = jnp.zeros(scores.shape, bool).at[:, words[:, -1]].max(_prefix_matches(words, history))
    return jnp.where(banned, NEVER, scores)


def _prefix_matches(words: jax.Array, history: History) -> jax.Array:
    """``[B, n]`` bool: whether a row ends in all ids of a sequence ``[n, W]`` but its last."""
    # The row's last W - 1 tokens, -2 where it is shorter than that, which matches nothing.
    columns = history.count - jnp.arange(words.shape[1] - 1, 0, -1)
    tail = jnp.take(history.tokens, columns, axis=1, mode="clip")
    tail = jnp.where(columns >= history.first[:, None], tail, -2)
    prefix = words[:, :-1]
    return ((tail[:, None] == prefix) | (prefix < 0)).all(-1)
