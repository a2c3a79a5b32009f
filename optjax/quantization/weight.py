"""A matrix in few bits: a pytree node that stands where the matrix would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.declaration import Axis
from optjax.quantization.codes import decode_4bit, encode_4bit, encode_int8, encode_table

Axes = tuple[Axis, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "column_scales"],
    meta_fields=["kind", "n_in", "group_size", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix ``[out, in]`` in 8 or 4 bits, or one of each layer ``[L, out, in]``.

    Its leaves are ordinary arrays: `jax.tree.map`, `jax.jit`, donation and shardings take them as they are.

    Attributes:
      values: int8 ``[…, out, in]``, or 4-bit codes ``[…, in, out]``; see `optjax.quantization.codes`.
      scales: ``[…, out]`` float32, or ``[…, G, out]`` bfloat16 for G groups of inputs.
      kind: ``"int8"``, ``"int4"`` or ``"nf4"``.
      n_in: the number of inputs.
      group_size: inputs that share a scale; all of them for int8.
      dtype: what the matrix stands for: that of the weights which are not quantized, and of the computation.
      column_scales: ``[in]`` float32, by which the inputs are multiplied besides; of int8 tables, else None.
    """

    values: Any
    scales: Any
    kind: str
    n_in: int
    group_size: int
    dtype: np.dtype
    column_scales: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[…, out, in]``, whatever the order in memory."""
        if self.kind == "int8":
            return tuple(self.values.shape)
        *lead, _, n_out = self.values.shape
        return (*lead, n_out, self.n_in)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def native(self) -> bool:
        """Whether 4-bit codes are jax's own 4-bit integers."""
        return self.values.dtype == jnp.int4

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(map(nbytes, jax.tree.leaves(self)))

    def astype(self, dtype: Any) -> QuantizedWeight:
        """The same codes, standing for another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def axes(self, axes: Axes) -> tuple[Axes, Axes]:
        """The logical axes of values and scales, from those of the matrix."""
        *lead, n_out, n_in = axes
        if self.kind == "int8":
            return axes, (*lead, n_out)
        return (*lead, n_in, n_out), (*lead, n_in, n_out)

    def map_with_axes(self, one: Callable[[Any, Axes], Any], axes: Axes) -> QuantizedWeight:
        """With ``one(leaf, its logical axes)`` in place of each leaf."""
        of_values, of_scales = self.axes(axes)
        columns = None if self.column_scales is None else one(self.column_scales, axes[-1:])
        made = {"values": one(self.values, of_values), "scales": one(self.scales, of_scales), "column_scales": columns}
        return dataclasses.replace(self, **made)

    def rows(self, index: jax.Array, dtype: Any = None) -> jax.Array:
        """Rows of a table, ``[…, in]`` in ``dtype``; int8 only."""
        assert self.kind == "int8"  # tables are never quantized to fewer bits
        dtype = self.dtype if dtype is None else dtype
        rows = self.values[index].astype(jnp.float32) * self.scales[index][..., None]
        return (rows if self.column_scales is None else rows * self.column_scales).astype(dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The matrix ``[…, out, in]``."""
        dtype = self.dtype if dtype is None else dtype
        if self.kind == "int8":
            whole = self.values.astype(jnp.float32) * self.scales[..., None]
            return (whole if self.column_scales is None else whole * self.column_scales).astype(dtype)
        return self.transposed(dtype).swapaxes(-1, -2)

    def transposed(self, dtype: Any) -> jax.Array:
        """The matrix ``[…, in, out]`` of a 4-bit weight: no transpose in memory."""
        *lead, groups, n_out = self.scales.shape
        parts = [self.values.astype(jnp.float32)] if self.native else decode_4bit(self.values, self.kind)
        shape = (*lead, groups, 1, self.group_size // len(parts), n_out)
        whole = jnp.concatenate([part.reshape(shape) for part in parts], axis=-3)
        scaled = whole * self.scales.astype(jnp.float32)[..., None, None, :]
        return scaled.reshape(*lead, -1, n_out)[..., : self.n_in, :].astype(dtype)


def encode(
    weight: jax.Array,
    kind: str,
    group_size: int,
    dtype: Any,
    *,
    native: bool,
    table: bool = False,
    scales: jax.Array | None = None,
) -> QuantizedWeight:
    """A matrix ``[…, out, in]`` quantized, with the scales given or its own (`scales_of`).

    ``native`` chooses the storage of int4 (`codes`), ``table`` scales of columns besides.
    """
    n_in, column_scales = weight.shape[-1], None
    if table:
        assert kind == "int8" and scales is None
        values, scales, column_scales = encode_table(weight)
        group_size = n_in
    elif kind == "int8":
        values, scales = encode_int8(weight, scales)
        group_size = n_in
    else:
        values, scales = encode_4bit(weight, kind, group_size, native, scales)
    return QuantizedWeight(values, scales, kind, n_in, group_size, jnp.dtype(dtype), column_scales)


def nbytes(array: Any) -> int:
    """Bytes of an array on a device, where 4-bit integers take half a byte."""
    bits = jnp.iinfo(array.dtype).bits if jnp.issubdtype(array.dtype, jnp.integer) else 8 * array.dtype.itemsize
    return -(-int(np.prod(array.shape)) * bits // 8)
