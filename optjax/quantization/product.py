"""Products with quantized weights, which are read as they are: no copy in full precision stays in memory.

A scale that all inputs of an output share is multiplied onto the product. What XLA makes of the rest decides the form:

- TPU, int8 and int4: a cast to bfloat16 is fused into the matrix product. The scales of groups would be spread over
  the matrix off the matrix unit; for few rows each group has a small product of its own, and its scales go onto that.
- CPU, int8: in integers (`optjax.quantization.int8_on_cpu`).
- 4 bits on a CPU, and nf4 on a TPU: what is read is written out before a product. So a loop decodes a block at a time,
  which stays in the processor's cache, or the TPU's fast memory.
- 4 bits on a GPU: such a loop would be hundreds of small kernels for a matrix, one after the other. For few rows there
  is a kernel that decodes as it multiplies (`optjax.kernels.four_bits`). For more, over several devices and where the
  kernel cannot be had, a matrix is decoded whole, in the dtype of x, right before its product.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from optjax.params import wider
from optjax.quantization.codes import decode_4bit
from optjax.quantization.int8_on_cpu import BLOCK, FEW_ROWS, int8_product, multiply_and_sum
from optjax.quantization.weight import QuantizedWeight


def product(
    x: jax.Array, weight: QuantizedWeight, *, on: str, spread: bool = False, kernels: bool = False
) -> jax.Array:
    """``x Wᵀ`` of x ``[…, in]`` and one matrix: ``[…, out]``, in float32 unless ``spread``, then in the dtype of x.

    Args:
      on: the platform.
      spread: the weight lies on several devices, between which partial sums travel.
      kernels: there are those of GPUs.

    The gradient with respect to x is the product with the other side of the matrix; the weight has none. Nothing but x
    and the codes is kept for it.
    """
    if weight.column_scales is not None:
        scaled = x.astype(wider(x.dtype, jnp.float32)) * weight.column_scales
        x = scaled if on == "cpu" and not spread else scaled.astype(x.dtype)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if kernels and not spread and weight.kind != "int8" and _fits_a_kernel(flat.shape[0], weight.group_size):
        return _by_kernel(flat, weight).reshape(*x.shape[:-1], -1)
    if on == "cpu" and not spread:
        flat = flat.astype(wider(x.dtype, jnp.float32))
        if weight.kind == "int8":
            y = int8_product(flat, weight.values) * weight.scales
        else:
            y = _groups_in_blocks(flat, weight)
        return y.reshape(*x.shape[:-1], -1)
    if on == "gpu" and flat.shape[0] == 1 and weight.kind == "int8" and not spread:
        # Where Triton's products are off, cuBLAS would have a copy of the codes in float32.
        y = multiply_and_sum(flat.astype(jnp.float32), weight.values) * weight.scales
        return y.reshape(*x.shape[:-1], -1)
    # A product with one row would not go to the matrix unit; on GPU, of 4 bits, its terms would be written in float32.
    if alone := flat.shape[0] == 1 and (on == "tpu" or (on == "gpu" and weight.kind != "int8")):
        flat = jnp.pad(flat, ((0, 7), (0, 0)))
    if weight.kind == "int8" or weight.native or on == "gpu" or spread:
        # Else a gradient would keep the matrix as it is cast: a copy of the weight, and in a scan of all layers'.
        y = jax.checkpoint(_whole, static_argnums=2)(flat, weight, x.dtype if spread else jnp.float32)
    else:
        y = _groups_in_blocks(flat, weight)
    y = y[:1] if alone else y
    return y.reshape(*x.shape[:-1], -1)


def _fits_a_kernel(rows: int, group_size: int) -> bool:
    from optjax.kernels import four_bits

    return four_bits.fits(rows, group_size)


@jax.custom_vjp
def _by_kernel(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    from optjax.kernels import four_bits
    from optjax.kernels.choice import interprets

    halves = _split(x, weight)
    return four_bits.product(halves, weight.values, weight.scales, kind=weight.kind, interpret=interprets())


def _by_kernel_backward(kept: tuple[jax.Array, QuantizedWeight], cotangent: jax.Array) -> tuple[jax.Array, None]:
    x, weight = kept
    return *jax.vjp(lambda x: _whole(x, weight, jnp.float32), x)[1](cotangent), None


_by_kernel.defvjp(lambda x, weight: (_by_kernel(x, weight), (x, weight)), _by_kernel_backward)


def _whole(x: jax.Array, weight: QuantizedWeight, dtype: Any) -> jax.Array:
    if weight.kind == "int8":
        y = jnp.einsum("ri,oi->ro", x, weight.values.astype(x.dtype), preferred_element_type=dtype)
        return y * weight.scales.astype(dtype)
    groups, n_out = weight.scales.shape
    scales, y = weight.scales.astype(jnp.float32)[:, None], jnp.zeros((), dtype)
    if weight.native and x.shape[0] <= FEW_ROWS:
        codes = weight.values.astype(x.dtype).reshape(groups, -1, n_out)
        y = jnp.einsum("rgi,gio->gro", *_split(x, weight), codes, preferred_element_type=jnp.float32)
        return (y * scales).sum(0).astype(dtype)
    parts = [weight.values.astype(jnp.float32)] if weight.native else decode_4bit(weight.values, weight.kind)
    for part, codes in zip(_split(x, weight), parts, strict=True):
        scaled = (codes.reshape(groups, -1, n_out) * scales).reshape(-1, n_out).astype(x.dtype)
        y += jnp.einsum("ri,io->ro", part.reshape(x.shape[0], -1), scaled, preferred_element_type=dtype)
    return y


def _split(x: jax.Array, weight: QuantizedWeight) -> list[jax.Array]:
    """x ``[rows, in]`` as the codes lie: ``[rows, G, g]``, or the two halves of each group."""
    groups, size = weight.scales.shape[0], weight.group_size
    x = jnp.pad(x, ((0, 0), (0, groups * size - weight.n_in)))
    parts = 1 if weight.native else 2
    x = x.reshape(x.shape[0], groups, parts, size // parts)
    return [x[:, :, i] for i in range(parts)]


def _groups_in_blocks(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    groups, n_out = weight.scales.shape
    most = max(1, BLOCK * (1 if x.shape[0] <= FEW_ROWS else 4) // (weight.group_size * n_out))
    n = max(each for each in range(1, min(most, groups) + 1) if groups % each == 0)
    parts = _split(x, weight)

    @jax.checkpoint
    def block(parts: list[jax.Array], values: jax.Array, scales: jax.Array, i: jax.Array) -> jax.Array:
        size = values.shape[0] // groups * n
        some = jax.lax.dynamic_slice_in_dim(values, i * size, size)
        codes = [some.astype(jnp.float32)] if weight.native else decode_4bit(some, weight.kind)
        scale = jax.lax.dynamic_slice_in_dim(scales, i * n, n).astype(jnp.float32)[:, None]
        y = jnp.zeros((), jnp.float32)
        for part, code in zip(parts, codes, strict=True):
            part = jax.lax.dynamic_slice_in_dim(part, i * n, n, axis=1).reshape(x.shape[0], -1)
            scaled = (code.reshape(n, -1, n_out) * scale).reshape(-1, n_out).astype(x.dtype)
            y += jnp.einsum("ri,io->ro", part, scaled, preferred_element_type=jnp.float32)
        return y

    def step(i, y):
        return y + block(parts, weight.values, weight.scales, i)

    none = jnp.zeros_like(jax.eval_shape(block, parts, weight.values, weight.scales, 0))  # see `in_blocks`
    return jax.lax.fori_loop(0, groups // n, step, none)
