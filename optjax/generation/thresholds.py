"""Order statistics over the vocabulary without a sort.

Sorting V scores is the slowest thing in a sampling step, on CPU and on TPU. A threshold is all that top-k, top-p and
typical-p need, and it is found exactly by bisection over the bits of a float32: 32 passes of compare and sum, with k
and p traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of each row of ``x`` ``[B, V]`` float32, k ≥ 1: ``[B, 1]``."""
    return _largest(x, lambda chosen: chosen.sum(-1, keepdims=True, dtype=jnp.int32) >= k)


def mass_threshold(x: jax.Array, p: jax.Array, mass: jax.Array) -> jax.Array:
    """The largest value of each row of ``x`` ``[B, V]`` at or above which lies at least ``mass`` of ``p``: ``[B, 1]``.

    Where rounding keeps the whole of a row below ``mass``, the least value there is: everything is kept.
    """
    threshold = _largest(x, lambda chosen: _row_sum(jnp.where(chosen, p, 0.0)) >= mass)
    # No higher than the largest, also where ``mass`` is so small that hardware takes it for 0 and all bits come out 1.
    largest = x.max(-1, keepdims=True)
    return jnp.where(threshold <= largest, threshold, largest)


def _largest(x: jax.Array, enough) -> jax.Array:
    """The largest threshold for which ``enough(x >= threshold)`` holds, bit by bit from the highest."""
    ordered = _to_ordered(x)

    def step(i, threshold):
        bit = jnp.uint32(1) << (jnp.uint32(31) - jnp.uint32(i))
        trial = threshold | bit
        return jnp.where(enough(ordered >= trial), trial, threshold)

    threshold = jax.lax.fori_loop(0, 32, step, jnp.zeros_like(ordered[..., :1]))
    return jnp.where(threshold == 0, -jnp.inf, _from_ordered(threshold))


def _row_sum(x: jax.Array) -> jax.Array:
    """Row sums ``[B, 1]`` of ``[B, V]`` in a fixed, blocked order: XLA's CPU backend vectorizes the outer sum only."""
    b, v = x.shape
    width = 64
    padded = jnp.pad(x, ((0, 0), (0, -v % width)))
    return padded.reshape(b, -1, width).sum(1).sum(-1, keepdims=True)


def _to_ordered(x: jax.Array) -> jax.Array:
    """Float32 as uint32 in the same order (-0 as +0)."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered(u: jax.Array) -> jax.Array:
    bits = jnp.where(u >> 31 == 1, u & jnp.uint32(0x7FFFFFFF), ~u)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
