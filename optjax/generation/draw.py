"""Choosing a token from scores: the most probable one, or a draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_WIDTH = 256


def most_probable(scores: jax.Array) -> jax.Array:
    """The index ``[B]`` of the largest of ``scores`` ``[B, V]`` float32, the first one of equals.

    In two steps: in ``argmax`` alone nobody asks for the maximum itself, which XLA's TPU backend then makes bfloat16.
    """
    return jnp.argmax(scores == scores.max(-1, keepdims=True), axis=-1).astype(jnp.int32)


def draw(keys: jax.Array, scores: jax.Array) -> jax.Array:
    """Indices ``[B]``, one drawn from the softmax of each row of ``scores`` ``[B, V]`` float32 with its key of ``[B]``.

    By inverting the distribution function in two levels: a block of columns, then a column in it, a uniform number for
    each. ``jax.random.categorical`` makes V random numbers a row, which on CPU takes longer than all else in sampling.
    """
    b, v = scores.shape
    p = jnp.exp(scores - scores.max(-1, keepdims=True))
    blocks = jnp.pad(p, ((0, 0), (0, -v % _WIDTH))).reshape(b, -1, _WIDTH)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(blocks.sum(-1), u[:, :1])
    column = _invert(jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0], u[:, 1:])
    return (block * _WIDTH + column)[:, 0].astype(jnp.int32)


def _invert(mass: jax.Array, u: jax.Array) -> jax.Array:
    """The first index ``[B, 1]`` where the running sum of ``mass`` ``[B, N]`` exceeds ``u`` of all, 0 ≤ u < 1."""
    # XLA sums in parallel: running sums over columns without mass may waver, so that only those with mass are asked.
    running = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0.0)
    return jnp.argmax(running > u * running.max(-1, keepdims=True), axis=-1, keepdims=True)
