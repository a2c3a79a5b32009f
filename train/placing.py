"""Where the arrays of a train state lie: each like the weight it belongs to."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from optjax.declaration import Weight
from optjax.params import Params, build_params


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


def place_records(records: np.ndarray, params: Params) -> Any:
    """Records ``[B, T + 1]`` on the devices of the params, rows split as the rules split the batch, if they divide.

    Every process gives the same records and copies its own rows only.
    """
    placement = params.placement
    if placement is None:
        return records
    sharding = placement.fitting(records.shape, ("batch", None))
    return jax.make_array_from_callback(records.shape, sharding, lambda index: records[index])
