"""Attention of a token a row, or a few, over a cache, on GPU: a Pallas kernel that reads the columns that a row has.

XLA's program reads all columns of a cache at every step, and writes scores and weights to memory in between. Here the
columns from the first that a row may look at to the last are shared between several programs, and what each found of
its own is put together at the end. (Flash decoding: Dao et al. 2023.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from optjax.attention import MASKED

# Queries are rows of a product on tensor cores, which has so many at least.
ROWS = 16
# Programs that keep the largest GPUs busy: a few on each of up to 150 multiprocessors.
PROGRAMS = 512
# The columns of a program are a multiple of so many.
UNIT = 32


def attend(q: jax.Array, mask: jax.Array, buffers: Any, *, interpret: bool) -> jax.Array:
    """Attention of T queries of each row, ``[B, T, H, K]``, in the dtype of q; sums in float32.

    Args:
      q: ``[B, T, H, K]``, scaled; T is 16 at most.
      mask: ``[B, T, S]`` bool, the columns that a query looks at; with none it gets the mean of some values.
      buffers: keys and values ``[B, H, S, K]``; or codes and scales ``[B, H, S]`` of keys, then those of values.
    """
    (b, t, h, k), columns = q.shape, mask.shape[2]
    width, block = pl.next_power_of_2(k), block_of_columns(k)
    n = parts(b * h, columns, block)
    used = mask.any(1)
    first = jnp.argmax(used, axis=1).astype(jnp.int32)
    end = (columns - jnp.argmax(used[:, ::-1], axis=1)).astype(jnp.int32)

    def of_row(row, head, part):
        return row, 0, 0

    def of_head(row, head, part):
        return row, head, 0, 0

    flat = pl.BlockSpec((None, None, columns, width), of_head)
    scales = pl.BlockSpec((None, None, columns), lambda row, head, part: (row, head, 0))
    bound = pl.BlockSpec((None,), lambda row, head, part: (row,))
    sums = pl.BlockSpec((None, None, None, ROWS), lambda *part: (*part, 0))
    total, largest, weight = pl.pallas_call(
        partial(_kernel, tokens=t, head_dim=k, block=block, parts=n),
        grid=(b, h, n),
        in_specs=[
            bound,
            bound,
            pl.BlockSpec((None, None, ROWS, width), of_head),
            pl.BlockSpec((None, ROWS, columns), of_row),
            *([flat, scales] if len(buffers) == 4 else [flat]) * 2,
        ],
        out_specs=[pl.BlockSpec((None, None, None, ROWS, width), lambda *part: (*part, 0, 0)), sums, sums],
        out_shape=[jax.ShapeDtypeStruct((b, h, n, t, *rest), jnp.float32) for rest in ((k,), (), ())],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(first, end, q.swapaxes(1, 2), mask.astype(jnp.int8), *buffers)
    kept = jnp.exp(largest - largest.max(2, keepdims=True))
    out = (total * kept[..., None]).sum(2) / (weight * kept).sum(2)[..., None]
    return out.swapaxes(1, 2).astype(q.dtype)


def block_of_columns(head_dim: int) -> int:
    """The columns whose keys, and values, a program has in its registers at a time."""
    return 128 if head_dim <= 64 else 64


def parts(heads: int, columns: int, block: int) -> int:
    """How many programs share the columns of a head, for so many heads in all rows; of all columns each has a block."""
    return max(1, min(-(-PROGRAMS // heads), columns // block))


def _kernel(first, end, q, mask, *rest, tokens: int, head_dim: int, block: int, parts: int):
    """One part of the columns of one head. Numbers come in powers of 2: what is beyond an array is read as 0."""
    *buffers, total_out, largest_out, weight_out = rest
    token, place = jnp.arange(ROWS), jnp.arange(q.shape[1])
    is_token, is_place = (token < tokens)[:, None], (place < head_dim)[None]
    begin, stop = first[()], end[()]
    share = _cdiv(stop - begin, parts * UNIT) * UNIT
    begin += pl.program_id(2) * share
    stop = jnp.minimum(begin + share, stop)
    queries = plgpu.load(q, mask=is_token & is_place, other=0)
    (k, *k_scales), (v, *v_scales) = buffers[: len(buffers) // 2], buffers[len(buffers) // 2 :]

    def step(i, found):
        total, largest, weight = found
        here = pl.ds(begin + i * block, block)
        inside = begin + i * block + jnp.arange(block) < stop

        def columns(buffer):
            return plgpu.load(buffer.at[here, :], mask=inside[:, None] & is_place, other=0).astype(queries.dtype)

        def scaled(x, scales):
            return x * plgpu.load(scales[0].at[here], mask=inside, other=0)[None] if scales else x

        scores = scaled(_product(queries, columns(k).T), k_scales)
        seen = plgpu.load(mask.at[:, here], mask=is_token & inside[None], other=0)
        scores = jnp.where(inside[None], jnp.where(seen != 0, scores, MASKED), -jnp.inf)
        now = jnp.maximum(largest, scores.max(1))
        kept, weights = jnp.exp(largest - now), jnp.exp(scores - now[:, None])
        added = _product(scaled(weights, v_scales).astype(queries.dtype), columns(v))
        return total * kept[:, None] + added, now, weight * kept + weights.sum(1)

    nothing = jnp.zeros((ROWS, q.shape[1]), jnp.float32), jnp.full(ROWS, -jnp.inf), jnp.zeros(ROWS, jnp.float32)
    total, largest, weight = jax.lax.fori_loop(0, _cdiv(jnp.maximum(stop - begin, 0), block), step, nothing)
    plgpu.store(total_out, total, mask=is_token & is_place)
    plgpu.store(largest_out, largest, mask=token < tokens)
    plgpu.store(weight_out, weight, mask=token < tokens)


def _cdiv(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.div(a + (b - 1), jnp.int32(b))  # an int alone would have 64 bits where jax_enable_x64 is on


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In float32; of float32 exactly, not in TF32."""
    return plgpu.dot(a, b, precision=jax.lax.Precision.HIGHEST)
