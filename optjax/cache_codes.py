"""Keys and values in 8 bits: codes with a scale for each head of each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from optjax.quantization.codes import encode_int8


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Codes:
    """Keys or values of a layer, ``codes * scales``.

    Attributes:
      codes: int8, in the layout of the cache.
      scales: ``[B, H, S]`` float32, or ``[H, S]`` of one row in the layout ``"heads"``. Columns stand last, where no
        backend pads them.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def dtype(self) -> np.dtype:
        return self.codes.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


Buffer = jax.Array | Codes


def encode(new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[B, T, H, K]`` as codes of that shape, rounded to the nearest, and scales ``[B, T, H]``: the largest is 127."""
    return encode_int8(new)


def map_buffer(function: Callable[[jax.Array, int], jax.Array], buffer: Buffer) -> Buffer:
    """A function of an array and its axis of columns, on each array of a buffer."""
    if isinstance(buffer, Codes):
        return Codes(function(buffer.codes, -2), function(buffer.scales, -1))
    return function(buffer, -2)


def first_columns(buffer: Buffer, n: int) -> Buffer:
    """The first n columns; the buffer itself if it has no more."""
    return map_buffer(lambda array, axis: jax.lax.slice_in_dim(array, 0, n, axis=axis), buffer)
