"""Products of a few rows with a matrix in 4 bits, on GPU: a Pallas kernel, compiled by Triton.

XLA would decode the whole matrix into memory before each product, and move nine times the bytes of its codes. Here a
program has some of the outputs; it decodes the codes of a group of inputs in its registers, and multiplies what they
sum up to by the group's scales. (Frantar et al. 2022, GPTQ, section 4: a row at a time waits for the weights, and those
in 4 bits come four times as fast.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from optjax.quantization.codes import NF4, decode_4bit

# What the smallest product on tensor cores has of rows, and of inputs.
ROWS = 16
INPUTS = 16
# The outputs of a program.
OUTPUTS = 64
# Programs that keep the largest GPUs busy, and the groups that are worth another one.
PROGRAMS = 512
GROUPS = 4


def fits(rows: int, group_size: int) -> bool:
    """Whether the kernel takes so many rows, and groups of so many inputs."""
    half = group_size // 2
    return rows <= ROWS and half >= INPUTS and half & (half - 1) == 0


def product(halves: Any, values: jax.Array, scales: jax.Array, *, kind: str, interpret: bool) -> jax.Array:
    """Products ``[rows, out]`` in float32; those of float32 are exact, not in TF32.

    Args:
      halves: the first half of each group's inputs, and the second, each ``[rows, G, g / 2]``.
      values: codes ``[G · g / 2, out]`` in int8, two in a byte; see `optjax.quantization.codes`.
      scales: ``[G, out]``.
    """
    rows, groups, half = halves[0].shape
    n_out = values.shape[1]
    tiles = pl.cdiv(n_out, OUTPUTS)
    parts = max(1, min(pl.cdiv(PROGRAMS, tiles), groups // GROUPS))

    def whole(tile, part):
        return 0, 0

    def of_tile(tile, part):
        return 0, tile

    inputs = pl.BlockSpec((ROWS, groups * half), whole)
    sums = pl.pallas_call(
        partial(_kernel, rows=rows, half=half, n_out=n_out, groups=groups, share=pl.cdiv(groups, parts), kind=kind),
        grid=(tiles, parts),
        in_specs=[
            inputs,
            inputs,
            pl.BlockSpec((groups * half, OUTPUTS), of_tile),
            pl.BlockSpec((groups, OUTPUTS), of_tile),
            pl.BlockSpec((1, len(NF4)), whole),
        ],
        out_specs=pl.BlockSpec((None, ROWS, OUTPUTS), lambda tile, part: (part, 0, tile)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, n_out), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name=f"{kind}_product",
    )(*(x.reshape(rows, -1) for x in halves), values, scales, jnp.array([NF4], halves[0].dtype))
    return sums.sum(0)


def _kernel(first, second, values, scales, levels, out, *, rows, half, n_out, groups, share, kind):
    """Some outputs, from a share of the groups. What is beyond an array is read as 0."""
    column = pl.program_id(0) * OUTPUTS + jnp.arange(OUTPUTS)
    is_row, is_output = (jnp.arange(ROWS) < rows)[:, None], (column < n_out)[None]

    def decoded(codes):
        if kind == "int4":
            return decode_4bit(codes, kind)
        # By a table: comparisons would be 15 instructions for each number.
        wide = codes.astype(jnp.int32)
        return [plgpu.load(levels.at[0, code]) for code in (wide & 15, (wide >> 4) & 15)]

    def step(group, total):
        here = pl.ds(group * half, half)
        codes = plgpu.load(values.at[here, :], mask=jnp.broadcast_to(is_output, (half, OUTPUTS)), other=0)
        sums = jnp.zeros(total.shape, jnp.float32)
        for x, level in zip((first, second), decoded(codes), strict=True):
            some = plgpu.load(x.at[:, here], mask=jnp.broadcast_to(is_row, (ROWS, half)), other=0)
            sums += plgpu.dot(some, level.astype(some.dtype), precision=jax.lax.Precision.HIGHEST)
        scale = plgpu.load(scales.at[group, :], mask=is_output[0], other=0)
        return total + sums * scale.astype(jnp.float32)[None]

    begin = pl.program_id(1) * share
    nothing = jnp.zeros((ROWS, OUTPUTS), jnp.float32)
    total = jax.lax.fori_loop(begin, jnp.minimum(begin + share, groups), step, nothing)
    plgpu.store(out, total, mask=is_row & is_output)
