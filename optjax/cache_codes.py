"""Keys and values in 8 bits: codes with a scale for each head of each token, and products that read them as they are.

The scale of a key stands outside its product with a query, and that of a value inside its weight: so the scores, and
the weights, are multiplied by scales, and the matrices are the codes. A cast to the dtype of the other side is fused
into the product on TPU and GPU. XLA's CPU backend would write it out: there a few heads at a time are cast, which stay
in the processor's cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.quantization.codes import encode_int8

# Numbers that are cast at a time on the CPU, a megabyte in float32; more where a single head has more.
BLOCK = 1 << 18


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Codes:
    """Keys or values of a layer, ``codes * scales``.

    Attributes:
      codes: int8, in the layout of the cache.
      scales: ``[B, H, S]`` float32, or ``[H, S]`` of one row in the layout ``"heads"``. Columns stand last, where no
        backend pads them.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def dtype(self) -> np.dtype:
        return self.codes.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


Buffer = jax.Array | Codes


def encode(new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[B, T, H, K]`` as codes of that shape, rounded to the nearest, and scales ``[B, T, H]``: the largest is 127."""
    return encode_int8(new)


def map_buffer(function: Callable[[jax.Array, int], jax.Array], buffer: Buffer) -> Buffer:
    """A function of an array and its axis of columns, on each array of a buffer."""
    if isinstance(buffer, Codes):
        return Codes(function(buffer.codes, -2), function(buffer.scales, -1))
    return function(buffer, -2)


def key_products(q: jax.Array, k: Buffer, in_parts: bool = False) -> jax.Array:
    """Products ``[…, H, T, S]`` in float32 of q ``[…, T, H, K]`` and keys ``[…, H, S, K]``."""
    if not isinstance(k, Codes):
        return jnp.einsum("...thk,...hsk->...hts", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    if in_parts:
        scores = _by_part(lambda q, k: jnp.einsum("htk,hsk->hts", q, k), q.swapaxes(-2, -3), k.codes)
    else:
        scores = jnp.einsum("...thk,...hsk->...hts", q, k.codes.astype(q.dtype), preferred_element_type=jnp.float32)
    return scores * k.scales[..., None, :]


def value_products(weights: jax.Array, v: Buffer, dtype: Any, in_parts: bool = False) -> jax.Array:
    """Sums ``[…, T, H, K]`` in ``dtype`` of values ``[…, H, S, K]``, by weights ``[…, H, T, S]`` in float32."""
    if not isinstance(v, Codes):
        return jnp.einsum("...hts,...hsk->...thk", weights.astype(dtype), v.astype(dtype))
    weights = weights * v.scales[..., None, :]
    if in_parts:
        out = _by_part(lambda weights, v: jnp.einsum("hts,hsk->htk", weights, v), weights, v.codes)
        return out.swapaxes(-2, -3).astype(dtype)
    return jnp.einsum("...hts,...hsk->...thk", weights.astype(dtype), v.codes.astype(dtype))


def _by_part(product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, codes: jax.Array) -> jax.Array:
    """Of x ``[…, H, T, _]`` and codes ``[…, H, S, K]`` their products in float32, a few heads of a row at a time.

    The codes are sliced as they lie: in another shape XLA would write the new column to a buffer for each shape.
    """
    *rows, heads, s, k = codes.shape
    size = max(each for each in range(1, max(1, min(BLOCK // (s * k), heads)) + 1) if heads % each == 0)
    in_a_row = heads // size

    def place(i: jax.Array) -> tuple[jax.Array | int, ...]:
        head = i % in_a_row * size
        return (i // in_a_row, head, 0, 0) if rows else (head, 0, 0)

    def part(i: jax.Array) -> jax.Array:
        some = (jax.lax.dynamic_slice(y, place(i), (*(1,) * len(rows), size, *y.shape[-2:])) for y in (x, codes))
        return product(*(y.reshape(size, *y.shape[-2:]).astype(jnp.float32) for y in some))

    out = jax.lax.map(part, jnp.arange(math.prod(rows) * in_a_row))
    return out.reshape(*rows, heads, *out.shape[-2:])
