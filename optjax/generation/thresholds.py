"""Order statistics over the vocabulary without a sort.

Sorting V scores is the slowest thing in a sampling step, on CPU and on TPU. A threshold is all that top-k, top-p and
typical-p need, and it is found exactly by bisection over the bits of a float32, with k and p traced: on a CPU in 32
passes of compare and sum, a bit each. On a GPU a pass is a few kernels that take longer to start than to run, and on
TPU a pass over the scores takes longer than a comparison: there a pass compares with several numbers at once, and
finds several bits.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

# Bits that a pass finds where it is not one. A pass of n compares with 2^n - 1 numbers.
_BITS_ON_TPU, _BITS_ON_GPU = 2, 4
# Scores that are summed at a time there, before the sums of all.
_WIDTH = 512


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of each row of ``x`` ``[B, V]`` float32, k ≥ 1: ``[B, 1]``."""
    return _largest(x, None, k)


def mass_threshold(x: jax.Array, p: jax.Array, mass: jax.Array) -> jax.Array:
    """The largest value of each row of ``x`` ``[B, V]`` at or above which lies at least ``mass`` of ``p``: ``[B, 1]``.

    Where rounding keeps the whole of a row below ``mass``, the least value there is: everything is kept.
    """
    threshold = _largest(x, p, mass)
    # No higher than the largest, also where ``mass`` is so small that hardware takes it for 0 and all bits come out 1.
    largest = x.max(-1, keepdims=True)
    return jnp.where(threshold <= largest, threshold, largest)


def _largest(x: jax.Array, p: jax.Array | None, least: jax.Array) -> jax.Array:
    """The largest threshold at or above which ``p``, or how many there are of ``x``, adds up to at least ``least``."""
    several = {"tpu": partial(_by_digits, _BITS_ON_TPU), "default": partial(_by_digits, _BITS_ON_GPU)}
    threshold = jax.lax.platform_dependent(_to_ordered(x), p, least, cpu=_by_bits, **several)
    return jnp.where(threshold == 0, -jnp.inf, _from_ordered(threshold))


def _by_bits(ordered: jax.Array, p: jax.Array | None, least: jax.Array) -> jax.Array:
    """`_largest` of numbers in order ``[B, V]`` uint32, bit by bit from the highest; 0 where none is."""

    def step(i, threshold):
        bit = jnp.uint32(1) << (jnp.uint32(31) - jnp.uint32(i))
        chosen = ordered >= (threshold | bit)
        total = chosen.sum(-1, keepdims=True, dtype=jnp.int32) if p is None else _row_sum(jnp.where(chosen, p, 0.0))
        return jnp.where(total >= least, threshold | bit, threshold)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros_like(ordered[..., :1]))


def _by_digits(bits: int, ordered: jax.Array, p: jax.Array | None, least: jax.Array) -> jax.Array:
    """`_by_bits`, so many at a time.

    Of a pass all sums are of the same parts in the same order: that above a higher number is not the larger one.
    """
    b, v = ordered.shape

    def in_parts(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -v % _WIDTH))).reshape(b, -1, _WIDTH)

    ordered, p = in_parts(ordered), None if p is None else in_parts(p)

    def step(i, threshold):
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * jnp.uint32(i)

        def sums(digit: int) -> jax.Array:
            # What was added to fill the last part is 0, and below all numbers that are asked about.
            chosen = ordered >= (threshold | jnp.uint32(digit) << shift)[..., None]
            return chosen.sum(-1, dtype=jnp.int32) if p is None else jnp.where(chosen, p, 0.0).sum(-1)

        totals = jnp.stack([sums(digit) for digit in range(1, 1 << bits)], axis=1).sum(-1)
        digit = (totals >= least).sum(-1, keepdims=True, dtype=jnp.uint32)
        return threshold | digit << shift

    return jax.lax.fori_loop(0, 32 // bits, step, jnp.zeros_like(ordered[:, 0, :1]))


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
