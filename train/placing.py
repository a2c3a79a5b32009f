"""Where the arrays of a train state lie: each like the weight it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from optjax.declaration import Weight
from optjax.params import Params, build_params
from optjax.placed import constrain


def shardings(params: Params, memory: str = "device") -> Params:
    """The sharding of every weight; ``memory`` as of `StepOptions.moments_memory`. Reads no leaf."""
    placement = params.placement

    def leaf(weight: Weight, _: int | None) -> Any:
        if placement is None:
            sharding: Any = SingleDeviceSharding(jax.devices()[0])
        else:
            sharding = placement.sharding((None, *weight.axes) if params.stacked and weight.per_layer else weight.axes)
        return sharding.with_memory_kind("pinned_host") if memory == "host" else sharding

    return build_params(params.config, params.head, leaf, stacked=params.stacked, placement=placement)


def place(params: Params, memory: str = "device") -> Params:
    """Inside a compiled program: arrays shaped like the weights, told to lie as the weights do."""
    if memory == "host":
        return jax.tree.map(jax.device_put, params, shardings(params, memory))
    if params.placement is None:
        return params
    return jax.tree.map(jax.lax.with_sharding_constraint, params, shardings(params))


def everywhere(params: Params) -> Any:
    """The sharding of a scalar beside the params."""
    if params.placement is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(params.placement.mesh, PartitionSpec())


def in_micro_batches(batch: Mapping[str, Any], params: Params, count: int) -> dict[str, jax.Array]:
    """Inside a compiled program: ``[count, B / count, …]`` of each array; part m has rows m, m + count, …, so that
    every device has its own of each."""

    def parts(array: jax.Array) -> jax.Array:
        b, *rest = array.shape
        cut = array.reshape(b // count, count, *rest).swapaxes(0, 1)
        return constrain(params.placement, cut, None, "batch", *(None for _ in rest))

    return {name: parts(array) for name, array in batch.items()}


def rows(params: Params, batch_size: int) -> range:
    """The rows of a batch that this process's devices need: from the first of them to the last. Reads no leaf."""
    placement = params.placement
    if placement is None:
        return range(batch_size)
    sharding: Any = placement.fitting((batch_size,), ("batch",))
    own = [index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    return range(min(start for start, _, _ in own), max(stop for _, stop, _ in own))


def place_batch(batch: Mapping[str, Any], params: Params, batch_size: int) -> dict[str, jax.Array]:
    """A batch on the devices of the params, rows split as the rules split the batch, if they divide.

    Args:
      batch: this process's `rows` of each array, numpy.
      batch_size: rows of all processes.

    Raises:
      ValueError: an array has another number of rows.
    """
    own = rows(params, batch_size)
    for name, array in batch.items():
        if array.shape[0] != len(own):
            raise ValueError(
                f"{name} has {array.shape[0]} rows, and this process's part of a batch of {batch_size} is rows "
                f"{own.start} to {own.stop - 1}"
            )
    if params.placement is None:
        return {name: jax.device_put(array) for name, array in batch.items()}
    return {name: _placed(np.asarray(array), params.placement, own, batch_size) for name, array in batch.items()}


def _placed(array: np.ndarray, placement: Any, own: range, batch_size: int) -> jax.Array:
    shape = (batch_size, *array.shape[1:])
    sharding = placement.fitting(shape, ("batch", *(None for _ in shape[1:])))

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return array[(slice(start - own.start, stop - own.start), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)
