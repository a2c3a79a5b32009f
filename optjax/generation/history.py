"""The tokens that rows hold so far, as score processors see them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from optjax.generation.settings import Settings
from optjax.generation.stop_strings import search_prompts

# The score of what may not come.
NEVER = -jnp.inf


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "first", "count", "new", "seen", "prompt", "stop"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens that rows hold so far.

    Attributes:
      tokens: ``[B, S]``; a row's real tokens stand in columns ``first`` to ``count``, without gaps.
      first: ``[B]``, a row's first real column.
      count: int32 scalar, columns filled, the same for all rows.
      new: int32 scalar, tokens generated.
      seen: ``[B, V]`` bool, the ids that a row holds; None where no processor asks.
      prompt: ``[B, V]`` bool, the ids of its prompt; None where no processor asks.
      stop: ``[B]`` int32, how far each row is in a stop string; None where there is none.
    """

    tokens: jax.Array
    first: jax.Array
    count: jax.Array
    new: jax.Array
    seen: jax.Array | None
    prompt: jax.Array | None = None
    stop: jax.Array | None = None

    def pick(self, rows: jax.Array) -> History:
        """Of these rows ``[B']``, each as often as it is named."""
        return jax.tree.map(lambda x: x[rows] if x.ndim else x, self)

    def append(self, token: jax.Array) -> History:
        """With one more token ``[B]`` in each row."""
        tokens = jax.lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.count, axis=1)
        rows = jnp.arange(token.shape[0])
        seen = None if self.seen is None else self.seen.at[rows, token].set(True)
        return dataclasses.replace(self, tokens=tokens, count=self.count + 1, new=self.new + 1, seen=seen)


def new_history(ids: jax.Array, mask: jax.Array, room: int, vocab_size: int, settings: Settings) -> History:
    """The history of prompts ``[B, T]`` whose real tokens stand at the right end, with room for more."""
    b, t = ids.shape

    def held() -> jax.Array:
        return jnp.zeros((b, vocab_size), bool).at[jnp.arange(b)[:, None], ids].max(mask)

    return History(
        tokens=jnp.pad(ids, ((0, 0), (0, room))),
        first=t - mask.sum(1, dtype=jnp.int32),
        count=jnp.int32(t),
        new=jnp.int32(0),
        seen=None if settings.repetition_penalty is None else held(),
        prompt=None if settings.encoder_repetition_penalty is None else held(),
        stop=None if settings.stop is None else search_prompts(settings.stop, ids, mask),
    )
