"""Params as a list of tensors to be written: the other direction of `names`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.match import expected
from optjax.checkpoints.quantized import COLUMN_SCALE, SCALE, stored
from optjax.declaration import Weight
from optjax.params import Params
from optjax.quantization.codes import pack_on_host
from optjax.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name in the file, and where to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    array: Any
    layer: int | None
    transpose: bool = False
    group_size: int | None = None  # of 4-bit codes, which are written two in a byte

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, on the host, contiguous."""
        value = to_host(self.array if self.layer is None else _take(self.array, np.int32(self.layer)))
        if self.group_size is not None and value.dtype != np.int8:
            value = pack_on_host(value, self.group_size)
        return np.ascontiguousarray(value.T if self.transpose else value)

    def raw(self) -> memoryview:
        """The values' bytes, little-endian, in C order."""
        values = self.read()
        return values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


def torch_entries(params: Params) -> Iterator[Entry]:
    """The tensors under transformers' PyTorch names, ``[out, in]``."""
    for weight, layer, _ in expected(params.config, params.head):
        name = weight.hf_name(layer)
        if params.head is None:
            name = name.removeprefix("model.")  # As transformers' base model has it.
        yield from _entries(params, weight, layer, name)


def flax_entries(params: Params) -> Iterator[Entry]:
    """The tensors under FlaxOPT's names joined by "/", kernels ``[in, out]``."""
    assert params.quantization is None  # refused by save_params
    for entry, (weight, _, _) in zip(torch_entries(params), expected(params.config, params.head), strict=True):
        *steps, last = entry.name.split(".")
        transpose = weight.kind in ("linear", "output")
        last = {"embedding": "embedding", "norm_weight": "scale", "linear": "kernel", "output": "kernel"}.get(
            weight.kind, last
        )
        shape = entry.shape[::-1] if transpose else entry.shape
        yield Entry("/".join([*steps, last]), shape, entry.dtype, entry.array, entry.layer, transpose)


def _entries(params: Params, weight: Weight, layer: int | None, name: str) -> Iterator[Entry]:
    node: Any = params.weights
    stacked = params.stacked and layer is not None
    for key in weight.keys(layer):
        node = node if stacked and isinstance(key, int) else node[key]
    shape = (params.config.num_hidden_layers, *weight.shape) if stacked else weight.shape
    if tuple(node.shape) != shape:
        raise ValueError(f"{name} should have shape {shape} by the config, but has {tuple(node.shape)}")
    taken = layer if stacked else None
    if not isinstance(node, QuantizedWeight):
        if not jnp.issubdtype(node.dtype, jnp.floating):
            raise ValueError(f"{name} is {node.dtype}; weights are saved as floating point, or quantized by optjax")
        yield Entry(name, weight.shape, np.dtype(node.dtype), node, taken)
        return
    assert params.quantization is not None
    like = stored(params.quantization, weight)
    assert like is not None
    size = None if node.kind == "int8" else node.group_size
    yield Entry(name, like.values.shape, np.dtype(like.values.dtype), node.values, taken, group_size=size)
    yield Entry(name + SCALE, like.scales.shape, np.dtype(like.scales.dtype), node.scales, taken)
    if node.column_scales is not None:
        yield Entry(name + COLUMN_SCALE, like.column_scales.shape, np.dtype(np.float32), node.column_scales, taken)


def to_host(array: Any) -> np.ndarray:
    """The values of an array. A jax array keeps the host's copy it is asked for, so a passing twin is asked instead.

    Of an array that lies in several processes too, if all of them ask.
    """
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
        parts = [shard.data for shard in array.addressable_shards]
        array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
    return np.asarray(array)


@jax.jit
def _take(stacked: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)
