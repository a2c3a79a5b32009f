"""Continuations that beam search follows side by side, and how it picks some of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# The score of a place where no hypothesis is yet, as in transformers.
NOTHING = -1e9


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "slots", "score", "logprobs"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Paths:
    """n continuations of each of B prompts; N tokens fit.

    Attributes:
      tokens: ``[B, n, N]`` int32, pad where there is none yet.
      slots: ``[B, n, N]`` int32, the place among a prompt's beams of the path that each token was added to; -1 where
        there is none yet.
      score: ``[B, n]`` float32, the sum of the log-probabilities; of finished ones, after the length penalty.
      logprobs: ``[B, n, N]`` float32, what each token added to the sum, 0 where there is none; None where not kept.
    """

    tokens: jax.Array
    slots: jax.Array
    score: jax.Array
    logprobs: jax.Array | None

    def extend(
        self, index: jax.Array, slot: jax.Array, token: jax.Array, logprob: jax.Array, score: jax.Array, step: Any
    ) -> Paths:
        """Paths ``[B, m]``: those at ``index`` ``[B, m]`` with one more token each, the one of this step."""

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new[..., None].astype(x.dtype), step, axis=2)

        old = pick(self, index)
        logprobs = None if old.logprobs is None else put(old.logprobs, logprob)
        return Paths(put(old.tokens, token), put(old.slots, slot), score, logprobs)


def no_paths(b: int, n: int, room: int, pad_id: jax.Array, keep_logprobs: bool) -> Paths:
    shape = b, n, room
    logprobs = jnp.zeros(shape, jnp.float32) if keep_logprobs else None
    return Paths(
        jnp.full(shape, pad_id), jnp.full(shape, -1, jnp.int32), jnp.full((b, n), NOTHING, jnp.float32), logprobs
    )


def pick(tree: Any, index: jax.Array) -> Any:
    """Of every array ``[B, n, …]`` those at ``index`` ``[B, m]``."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(one, tree)


def join(*trees: Any) -> Any:
    """Arrays ``[B, n, …]`` side by side."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *trees)


def best(n: int, score: jax.Array) -> jax.Array:
    """Indices ``[B, n]`` of the largest of ``score`` ``[B, m]``, from the largest down, equals in their order."""
    return jax.lax.top_k(score, n)[1]
