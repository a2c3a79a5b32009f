"""The two matrix products of attention, by heads: as einsums, and as XLA's CPU backend does them best.

Of keys and values in 8 bits the matrices are the codes. The scale of a key stands outside its product with a query, and
that of a value inside its weight: so the scores, and the weights, are multiplied by scales. A cast to the dtype of the
other side is fused into the product on TPU and GPU. On a CPU it would be written out: there a few heads at a time are
cast, which stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optjax.cache_codes import Buffer, Codes
from optjax.params import wider

# Numbers that are cast at a time on the CPU, a megabyte in float32; more where a single head has more.
BLOCK = 1 << 18
# Up to this many queries of a head are multiplied from the right on the CPU.
FEW_QUERIES = 32


def key_products(q: jax.Array, k: Buffer, on_cpu: bool = False, on_gpu: bool = False) -> jax.Array:
    """Products ``[…, H, T, S]`` in float32 of q ``[…, T, H, K]`` and keys ``[…, H, S, K]``."""
    if isinstance(k, Codes):
        if on_cpu:
            scores = _by_part(lambda q, k: jnp.einsum("htk,hsk->hts", q, k), q.swapaxes(-2, -3), k.codes)
        else:
            scores = jnp.einsum("...thk,...hsk->...hts", q, k.codes.astype(q.dtype), preferred_element_type=jnp.float32)
        return scores * k.scales[..., None, :]
    q, k = _alike(q, k, on_cpu and q.shape[-3] <= FEW_QUERIES)
    if on_cpu and q.shape[-3] > 1:
        return _key_products_on_cpu(q, k)
    return _in_float32(q, k) if on_gpu and q.dtype.itemsize < 4 else _key_products(q, k, jnp.float32)


def value_products(weights: jax.Array, v: Buffer, dtype: Any, on_cpu: bool = False) -> jax.Array:
    """Sums ``[…, T, H, K]`` in ``dtype`` of values ``[…, H, S, K]``, by weights ``[…, H, T, S]`` in float32."""
    if isinstance(v, Codes):
        weights = weights * v.scales[..., None, :]
        if on_cpu:
            out = _by_part(lambda weights, v: jnp.einsum("hts,hsk->htk", weights, v), weights, v.codes)
            return out.swapaxes(-2, -3).astype(dtype)
        return jnp.einsum("...hts,...hsk->...thk", weights.astype(dtype), v.codes.astype(dtype))
    weights, v = _alike(weights.astype(dtype), v, on_cpu and weights.shape[-2] <= FEW_QUERIES)
    if on_cpu and weights.shape[-2] > 1:
        return _apart(jnp.einsum("...hts,...hsk->...htk", weights, v)).swapaxes(-2, -3).astype(dtype)
    return jnp.einsum("...hts,...hsk->...thk", weights, v).astype(dtype)


def _key_products(q: jax.Array, k: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum("...thk,...hsk->...hts", q, k, preferred_element_type=dtype)


@jax.custom_jvp
def _in_float32(q: jax.Array, k: jax.Array) -> jax.Array:
    """`_key_products` in float32 of what has 16 bits, with a derivative in 16 bits.

    Its own would multiply the scores' cotangent in float32 with keys and queries in float32, off the tensor cores of
    GPUs before Ampere. The TPU compiler rounds them itself, and by its estimate does worse if it is told to.
    """
    return _key_products(q, k, jnp.float32)


@_in_float32.defjvp
def _in_float32_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (q, k), (dq, dk) = primals, tangents
    change = _key_products(dq, k, q.dtype) + _key_products(q, dk, q.dtype)
    return _in_float32(q, k), change.astype(jnp.float32)


def _alike(x: jax.Array, kept: jax.Array, widen: bool) -> tuple[jax.Array, jax.Array]:
    """Both in the dtype of x; or in the wider one: few queries are not worth a narrower copy of all that is kept."""
    dtype = wider(x.dtype, kept.dtype) if widen else x.dtype
    return x.astype(dtype), kept.astype(dtype)


def _key_products_on_cpu(q: jax.Array, k: jax.Array) -> jax.Array:
    """XLA would take transposes into the products, whose heads then do not lie whole: 2 to 4 times as slow."""
    if q.shape[-3] > FEW_QUERIES:
        q = _apart(q.swapaxes(-2, -3))
        return jnp.einsum("...htk,...hsk->...hts", q, k, preferred_element_type=jnp.float32)
    q = _apart(jnp.moveaxis(q, -3, -1))
    return _apart(jnp.einsum("...hsk,...hkt->...hst", k, q, preferred_element_type=jnp.float32)).swapaxes(-1, -2)


def _apart(x: jax.Array) -> jax.Array:
    """x, computed by itself: the compiler merges nothing across this line."""
    return jax.lax.optimization_barrier(x)


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
