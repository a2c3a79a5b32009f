"""Brings tensors from files onto devices, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from optjax.checkpoints.tensors import TensorRef, aligned_empty, block
from optjax.declaration import Weight
from optjax.offloading import host_sharding, is_on_host
from optjax.params import stacked_sharding

if TYPE_CHECKING:
    from optjax.sharding import Placement

# What puts one weight, of one layer, where it belongs: `place(weight, layer, tensor, dtype)` gives the array.
Placer = Callable[[Weight, int | None, TensorRef, np.dtype], jax.Array]


def placer(placement: Placement | None) -> Placer:
    """How to place weights: on the default device, or spread over a mesh."""
    if placement is None:
        return place_on_one_device

    def place(weight: Weight, layer: int | None, tensor: TensorRef, dtype: np.dtype) -> jax.Array:
        return place_on_mesh(placement.sharding(weight.axes), tensor, dtype)

    return place


def place_on_mesh(sharding: jax.sharding.NamedSharding, tensor: TensorRef, dtype: np.dtype) -> jax.Array:
    """The tensor spread over devices. Each process reads the blocks that its own devices hold, each block once."""
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
        holders.setdefault(tuple(block(index or (), tensor.shape)), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        host = as_dtype(tensor.read(tuple(slice(*b) for b in bounds)), dtype)
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)


def place_on_one_device(weight: Weight, layer: int | None, tensor: TensorRef, dtype: np.dtype) -> jax.Array:
    """The tensor on the default device. It is there when this returns, so that the host's copy can go."""
    return jax.block_until_ready(jax.device_put(as_dtype(tensor.read(), dtype)))


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another dtype, aligned as jax likes it."""
    if array.dtype == dtype:
        return array
    cast = aligned_empty(array.shape, dtype)
    cast[...] = array
    return cast


def stack(weights: Iterator[Any], n: int, *, on_host: bool = False) -> Any:
    """``[L, …]`` from an iterator of ``L`` arrays, or trees of them, without holding all of them beside their stack.

    The stack is spread over devices as its layers are; that of matrices lies in their hosts' memory if ``on_host``.
    """

    def add(stacked: jax.Array | None, array: jax.Array, i: int) -> jax.Array:
        sharding = stacked_sharding(array.sharding)
        empty, put = _programs(host_sharding(sharding) if on_host and array.ndim > 1 else sharding)
        return put(empty(array, n) if stacked is None else stacked, array, np.int32(i))

    first = next(weights)
    stacked = jax.tree.map(lambda array: add(None, array, 0), first)
    for i, weight in enumerate(weights, start=1):
        stacked = jax.block_until_ready(jax.tree.map(partial(add, i=i), stacked, weight))
    return stacked


@cache
def _programs(sharding: jax.sharding.Sharding):
    on_host = is_on_host(sharding)

    @partial(jax.jit, static_argnums=1, out_shardings=sharding)
    def empty(like: jax.Array, n: int) -> jax.Array:
        return jnp.zeros((n, *like.shape), like.dtype)

    def empty_on_host(like: jax.Array, n: int) -> jax.Array:
        # A program would make it on the device first. numpy's zeros take no memory until they are written.
        shape = (n, *like.shape)
        if isinstance(sharding, SingleDeviceSharding):
            return jax.device_put(np.zeros(shape, like.dtype), sharding)
        part = sharding.shard_shape(shape)
        return jax.make_array_from_callback(shape, sharding, lambda _: np.zeros(part, like.dtype))

    @partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(stacked: jax.Array, array: jax.Array, i: jax.Array) -> jax.Array:
        if on_host:
            array = jax.device_put(array, jax.memory.Space.Host)
        return jax.lax.dynamic_update_index_in_dim(stacked, array, i, axis=0)

    return empty_on_host if on_host else empty, put
