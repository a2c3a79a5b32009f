"""Choosing a token from scores: the most probable one, or a draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.manual import as_after

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
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    block = _invert(blocks.sum(-1), u[:, :1])
    column = _invert(jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0], u[:, 1:])
    return (block * _WIDTH + column)[:, 0].astype(jnp.int32)


def draw_several(keys: jax.Array, scores: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """n draws of each row of ``scores`` ``[B, V]`` without replacement: their scores and indices ``[B, n]``, in order.

    Each is drawn from the softmax of what is left, with the row's key of ``[B]``. Where nothing is left that has any
    probability, the score is -inf.
    """
    b, v = scores.shape
    p = jnp.where(scores == -jnp.inf, 0.0, jnp.exp(scores - scores.max(-1, keepdims=True)))
    blocks = jnp.pad(p, ((0, 0), (0, -v % _WIDTH))).reshape(b, -1, _WIDTH)
    sums, rows = blocks.sum(-1), jnp.arange(b)
    u = jax.vmap(lambda key: jax.random.uniform(key, (n, 2, 1), jnp.float32))(keys)

    def one(left, u):
        blocks, sums = left
        block = _invert(sums, u[:, 0])[:, 0]
        its_own = blocks[rows, block]
        column = _invert(its_own, u[:, 1])[:, 0]
        mass = its_own[rows, column]
        its_own = its_own.at[rows, column].set(0.0)
        # Summed anew: a difference would leave a little of what was taken.
        return (blocks.at[rows, block].set(its_own), sums.at[rows, block].set(its_own.sum(-1))), (
            block * _WIDTH + column,
            mass,
        )

    left = as_after(lambda left: one(left, u[:, 0])[0], (blocks, sums))
    _, (index, mass) = jax.lax.scan(one, left, u.swapaxes(0, 1))
    index = jnp.minimum(index.T, v - 1).astype(jnp.int32)
    return jnp.where(mass.T > 0, jnp.take_along_axis(scores, index, axis=1), -jnp.inf), index


def _invert(mass: jax.Array, u: jax.Array) -> jax.Array:
    """The first index ``[B, 1]`` where the running sum of ``mass`` ``[B, N]`` exceeds ``u`` of all, 0 ≤ u < 1."""
    # XLA sums in parallel: running sums over columns without mass may waver, so that only those with mass are asked.
    running = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0.0)
    return jnp.argmax(running > u * running.max(-1, keepdims=True), axis=-1, keepdims=True)
