"""Attention of a token a row, or a few, over a flat cache, on TPU: a Pallas kernel that reads what a row has, no more.

A cache has columns for all tokens that may come, and XLA's program reads all of them at every step. Here a row's keys
and values are fetched by blocks of columns, from the first that it may look at to the last: what is not there yet, what
is padding on the left, and what a row that has ended did not use costs nothing. Which blocks these are is settled when
the program runs. (Flash decoding: Dao et al. 2023; blocks of a row's own: Kwon et al. 2023, PagedAttention.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optjax.attention import MASKED
from optjax.kernels.choice import LANES  # in which columns stand, of masks and of scales


def attend(q: jax.Array, mask: jax.Array, buffers: Any, *, head_dim: int, interpret: bool) -> jax.Array:
    """Attention of T queries of each row, ``[B, T, D]``, in the dtype of q; sums in float32.

    Args:
      q: ``[B, T, D]``, scaled, the heads side by side.
      mask: ``[B, T, S]`` bool, the columns that a query looks at; with none it gets the mean of some values.
      buffers: keys and values ``[B, S, D]``; or codes and scales ``[B, H, S]`` of keys, then those of values.
    """
    (b, t, width), columns = q.shape, mask.shape[2]
    heads, coded = width // head_dim, len(buffers) == 4
    rows = heads_in_rows(heads)
    block = block_of_columns(columns, width * buffers[0].dtype.itemsize)
    assert block is not None  # settled by `fits`
    n = columns // block
    used = mask.any(1).reshape(b, n, block).any(-1)
    first = jnp.argmax(used, axis=1).astype(jnp.int32)
    last = n - 1 - jnp.argmax(used[:, ::-1], axis=1).astype(jnp.int32)

    def of_columns(row, i, first, last):
        row, here = fetched(row, i, first, last, b)
        return row, here, 0

    def of_lanes(row, i, first, last):
        row, here = fetched(row, i, first, last, b)
        return row, 0, here

    def whole(row, i, first, last):
        return row, 0, 0

    tokens, flat = pl.BlockSpec((1, t, width), whole), pl.BlockSpec((1, block, width), of_columns)
    scales = pl.BlockSpec((1, rows, block), of_lanes)
    return pl.pallas_call(
        partial(_kernel, head_dim=head_dim, coded=coded),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, n),
            in_specs=[tokens, pl.BlockSpec((1, t, block), of_lanes), *([flat, scales] if coded else [flat]) * 2],
            out_specs=tokens,
            scratch_shapes=[
                pltpu.VMEM((t * rows, width), q.dtype),
                pltpu.VMEM((t * rows, width), jnp.float32),
                pltpu.VMEM((t * rows, LANES), jnp.float32),
                pltpu.VMEM((t * rows, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * columns * heads * width,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in buffers),
            transcendentals=b * t * columns * heads,
        ),
        interpret=interpret,
        name="decode_attention",
    )(first, last, q, jnp.where(mask, 0.0, MASKED), *buffers)


# Rows of a register, of 32 bits each.
SUBLANES = 8
# A block of keys, and one of values, has about so many bytes: while they come, the block before is computed. By the
# compiler's schedule that takes 0.7 µs on v5e for 256 columns of OPT-1.3b, and 2 MiB take 2.6 µs to come.
_BLOCK_BYTES = 1 << 20
# The least that any TPU gives a kernel is 16 MiB.
_MEMORY = 14 << 20


def fetched(row, i, first, last, rows: int):
    """The row and the block that are in the core's memory at a step; what is there already is not fetched again.

    Where a row has no more blocks it is the first of the next row, which then comes while the last one is computed.
    """
    here = first[row] + i
    over, following = here > last[row], jnp.minimum(row + 1, rows - 1)
    ahead = jnp.where(following > row, first[following], last[row])
    return jnp.where(over, following, row), jnp.where(over, ahead, here)


def heads_in_rows(heads: int) -> int:
    """The rows that the heads of a token take; those of several tokens then begin where a register does."""
    return -(-heads // SUBLANES) * SUBLANES


def block_of_columns(columns: int, column_bytes: int) -> int | None:
    """The columns of a block, for keys of so many bytes a column; None where none divides all columns."""
    if columns <= LANES:
        return columns
    sizes = [size for size in (512, 384, 256, 128) if columns % size == 0]
    fitting = [size for size in sizes if size * column_bytes <= _BLOCK_BYTES]
    return max(fitting, default=min(sizes, default=None))


def fits(tokens: int, heads: int, head_dim: int, columns: int, itemsize: int, cache_itemsize: int) -> bool:
    """Whether what is held at a time fits into a core's memory, with numbers of so many bytes."""
    width = heads * head_dim
    block = block_of_columns(columns, width * cache_itemsize)
    if block is None:
        return False
    rows = tokens * heads_in_rows(heads)
    held = 4 * block * width * cache_itemsize  # the block that is computed, and the one that comes
    held += block * width * itemsize * (itemsize != cache_itemsize)  # keys, or values, as they are cast
    held += rows * width * (itemsize + 2 * 4)  # queries of all heads, sums, and what is added to them
    held += 3 * rows * block * 4  # scores and weights
    return held <= _MEMORY


def _kernel(first, last, q, bias, *rest, head_dim: int, coded: bool):
    """A step: the next block of a row. The queries of all heads meet its keys in one product, laid out block-diagonally
    (see attention.py), and the outputs' blocks are taken from the diagonal at the end."""
    *buffers, out, queries, total, largest, weight = rest
    row, i = pl.program_id(0), pl.program_id(1)
    t, width = q.shape[1:]

    def by_token(x):
        return x.reshape(t, -1, x.shape[-1])

    def diagonal(x):
        head, column = (jax.lax.broadcasted_iota(jnp.int32, by_token(total).shape, axis) for axis in (1, 2))
        return jnp.where((column >= head * head_dim) & (column < (head + 1) * head_dim), x, 0)

    @pl.when(i == 0)
    def _():
        own = diagonal(q[0].astype(jnp.float32)[:, None])
        queries[...] = own.reshape(queries.shape).astype(queries.dtype)
        total[...] = jnp.zeros_like(total)
        largest[...] = jnp.full_like(largest, -jnp.inf)
        weight[...] = jnp.zeros_like(weight)

    @pl.when(first[row] + i <= last[row])
    def _():
        k, v = (_plain(x[0], queries.dtype) for x in (buffers[0], buffers[len(buffers) // 2]))
        scores = jax.lax.dot_general(queries[...], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = by_token(scores) * (buffers[1][...] if coded else 1.0) + bias[0][:, None]
        scores = scores.reshape(total.shape[0], -1)
        before = largest[:, :1]
        now = jnp.maximum(before, scores.max(1, keepdims=True))
        kept, weights = jnp.exp(before - now), jnp.exp(scores - now)
        largest[...] = jnp.broadcast_to(now, largest.shape)
        weight[...] = weight[...] * kept + weights.sum(1, keepdims=True)
        if coded:
            weights = (by_token(weights) * buffers[3][...]).reshape(weights.shape)
        total[...] = total[...] * kept + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        out[0] = diagonal(by_token(total[...] / weight[:, :1])).sum(1).astype(out.dtype)


def _plain(x: jax.Array, dtype: Any) -> jax.Array:
    """Codes in the dtype of a product, by way of float32: no TPU casts them at once."""
    return x.astype(jnp.float32).astype(dtype) if x.dtype == jnp.int8 else x.astype(dtype)
