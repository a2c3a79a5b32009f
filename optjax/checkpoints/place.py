"""Brings tensors from files onto devices, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.tensors import TensorRef, aligned_empty
from optjax.config import OPTConfig
from optjax.declaration import Weight

# What puts one weight, of one layer, where it belongs: `place(weight, layer, tensor, dtype)` gives the array. For a
# mesh `optjax.sharding.checkpoint_placer(config, head, mesh, rules)` provides one; it reads only the blocks that this
# process's devices hold, by `tensor.read(index)`.
Placer = Callable[[Weight, int | None, TensorRef, np.dtype], jax.Array]


def placer(config: OPTConfig, head: str | None, mesh: Any, rules: Any) -> Placer:
    """How to place weights: on the default device, or spread over a mesh.

    Raises:
      ValueError: rules without a mesh, or a mesh where ``optjax.sharding`` cannot place checkpoints.
    """
    if mesh is None:
        if rules is not None:
            raise ValueError("rules say how weights are spread over a mesh: pass mesh= too")
        return place_on_one_device
    try:
        from optjax.sharding import checkpoint_placer  # type: ignore[import-not-found, attr-defined]
    except ImportError:
        raise ValueError(
            "mesh= needs optjax.sharding to place weights, and this installation of it cannot: load without mesh="
        ) from None
    return checkpoint_placer(config, head, mesh, rules)


def place_on_one_device(weight: Weight, layer: int | None, tensor: TensorRef, dtype: np.dtype) -> jax.Array:
    """The tensor on the default device. It is there when this returns, so that the host's copy can go."""
    array = tensor.read()
    if array.dtype != dtype:
        cast = aligned_empty(array.shape, dtype)
        cast[...] = array
        array = cast
    return jax.block_until_ready(jax.device_put(array))


def stack(arrays: Iterator[jax.Array], n: int) -> jax.Array:
    """``[L, …]`` from an iterator of ``L`` arrays, without holding all of them beside their stack.

    The stack is spread over devices as its layers are.
    """
    first = next(arrays)
    empty, put = _programs(_stacked_sharding(first.sharding))
    stacked = put(empty(first, n), first, np.int32(0))
    for i, array in enumerate(arrays, start=1):
        stacked = jax.block_until_ready(put(stacked, array, np.int32(i)))
    return stacked


def _stacked_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))
    return sharding


@cache
def _programs(sharding: jax.sharding.Sharding):
    @partial(jax.jit, static_argnums=1, out_shardings=sharding)
    def empty(like: jax.Array, n: int) -> jax.Array:
        return jnp.zeros((n, *like.shape), like.dtype)

    @partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(stacked: jax.Array, array: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, array, i, axis=0)

    return empty, put
