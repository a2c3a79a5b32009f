"""Rows of a table whose columns are spread over the devices that have other tokens.

The table is not gathered for them. Each device looks up, for the tokens of all those devices, the columns that it has;
then they exchange, and each has its own tokens' rows whole. The other way round each gets the cotangents, in its
columns, of all those tokens, and adds them to its own part of the table. A token's row travels once, and no device ever
holds a whole table, nor a gradient of one.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optjax.placed import cast

if TYPE_CHECKING:
    from optjax.declaration import Axis

    from .placement import Placement

Names = tuple[str, ...]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(table: jax.Array, index: jax.Array, dtype: Any, placement: Placement, axes: tuple[Axis, ...]) -> jax.Array:
    """``table[index]`` in ``dtype``, ``[B, T, E]``, rows and their length split as the rules split tokens.

    Args:
      table: ``[V, E]``, in its sharding.
      index: ``[B, T]``.
      axes: the table's logical axes.
    """
    ways = _ways(placement, axes, index.shape)
    at = _constrain(placement, index, ways[0][:2])
    rows = cast(_whole_rows(placement, table, axes)[at], dtype)
    for way in ways:
        rows = _constrain(placement, rows, way)
    return rows


def _forward(table, index, dtype, placement, axes):
    return lookup(table, index, dtype, placement, axes), (index, table)


def _backward(dtype, placement, axes, kept, cotangent):
    index, table = kept
    ways = _ways(placement, axes, index.shape)
    for way in reversed(ways):
        cotangent = _constrain(placement, cotangent, way)
    rows, length, columns = ways[0]
    p, q = (math.prod(placement.mesh.shape[name] for name in names) for names in (rows, length))

    def in_parts(x):
        # What is left of the tokens' parts, each with a sum of its own: else every token is added on all devices.
        b, t, *rest = x.shape
        return _constrain(
            placement, x.reshape(p, b // p, q, t // q, *rest), (rows, (), length, (), columns)[: x.ndim + 2]
        )

    index = in_parts(_constrain(placement, index, (rows, length)))
    sums = jax.vmap(jax.vmap(partial(_sum_rows, table), in_axes=1), in_axes=0)(
        index, in_parts(cotangent.astype(jnp.float32))
    )
    sums = _constrain(placement, sums, (rows, length, _whole(placement, axes[0]), columns)).sum((0, 1))
    return jax.lax.with_sharding_constraint(sums, placement.sharding(axes)).astype(table.dtype), None


lookup.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup_gathered(
    table: jax.Array, index: jax.Array, dtype: Any, placement: Placement, axes: tuple[Axis, ...]
) -> jax.Array:
    """`lookup` by a gather of the table; its cotangent is summed whole, by each device for its tokens."""
    table = jax.lax.with_sharding_constraint(cast(table, dtype), placement.gathered(axes))
    return _of_tokens(placement, table[index])


def lookup_coded(table: Any, index: jax.Array, dtype: Any, placement: Placement, axes: tuple[Axis, ...]) -> jax.Array:
    """`lookup` in a quantized table, which has no cotangent."""
    ways = _ways(placement, axes, index.shape)
    rows = table.rows(_constrain(placement, index, ways[0][:2]), dtype)
    for way in ways:
        rows = _constrain(placement, rows, way)
    return rows


def _forward_gathered(table, index, dtype, placement, axes):
    return lookup_gathered(table, index, dtype, placement, axes), (index, table)


def _backward_gathered(dtype, placement, axes, kept, cotangent):
    index, table = kept
    index, cotangent = (placement.in_parts(x) for x in (index, _of_tokens(placement, cotangent.astype(jnp.float32))))
    sums = jax.vmap(jax.vmap(partial(_sum_rows, table), in_axes=1), in_axes=0)(index, cotangent)
    return placement.total(sums, axes).astype(table.dtype), None


lookup_gathered.defvjp(_forward_gathered, _backward_gathered)


def _sum_rows(table: jax.Array, index: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Cotangents of rows, each added to its row of a float32 array of the table's shape."""
    return jnp.zeros(table.shape, jnp.float32).at[index].add(cotangent)


def _of_tokens(placement: Placement, rows: jax.Array) -> jax.Array:
    # Not the residual stream's sharding yet: for that the compiler would gather the vocabulary.
    return jax.lax.with_sharding_constraint(rows, placement.fitting(rows.shape, ("batch", "length", None)))


def _ways(placement: Placement, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> list[tuple[Names, Names, Names]]:
    """How rows ``[B, T, E]`` lie: as they are looked up, then after each exchange. An exchange takes one mesh axis from
    the columns and has it split the tokens, if it does; the last axis, which is innermost, first."""
    tokens = [placement.dividing(size, axis) for size, axis in zip(shape, ("batch", "length"), strict=True)]
    columns = placement.mesh_axes(axes[1])

    def lie(left: Names) -> tuple[Names, Names, Names]:
        rows, length = (tuple(name for name in names if name not in left) for names in tokens)
        return rows, length, left

    return [lie(columns[:n]) for n in range(len(columns), -1, -1)]


def _whole_rows(placement: Placement, table: jax.Array, axes: tuple[Axis, ...]) -> jax.Array:
    """The table, gathered along the mesh axes by which tokens and the table's rows are split, if there are any."""
    return _constrain(placement, table, (_whole(placement, axes[0]), placement.mesh_axes(axes[1])))


def _whole(placement: Placement, axis: Axis) -> Names:
    return tuple(name for name in placement.mesh_axes(axis) if name not in placement.token_axes)


def _constrain(placement: Placement, x: jax.Array, split: tuple[Names, ...]) -> jax.Array:
    sharding = NamedSharding(placement.mesh, PartitionSpec(*(names or None for names in split)))
    return jax.lax.with_sharding_constraint(x, sharding)
