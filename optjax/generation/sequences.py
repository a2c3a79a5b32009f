"""Score processors for token sequences that a caller lists."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.options import Settings


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
