"""Quantized weights in files: what they are called there, what shape they have, and which config.json goes with them.

A quantized matrix ``….weight`` is stored as its codes in int8 (4-bit codes two in a byte; `optjax.quantization.codes`)
under its own name, and its scales under ``….weight_scale``; of a table those of columns under ``….weight_column_scale``
(older files have none, and mean 1); everything else as ever. config.json says how:
``"quantization_config": {"quant_method": "optjax", "kind": "int4", "group_size": 64}``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.errors import CheckpointError, shorten
from optjax.checkpoints.place import Placer
from optjax.checkpoints.tensors import Index, TensorRef, block
from optjax.config import OPTConfig
from optjax.declaration import Weight
from optjax.quantization.codes import unpack_on_host
from optjax.quantization.quantize import Quantization, encode_placed, is_table
from optjax.quantization.weight import QuantizedWeight, encode

METHOD = "optjax"
SCALE = "_scale"
COLUMN_SCALE = "_column_scale"


def config_entry(quantization: Quantization) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    entry: dict[str, Any] = {"quant_method": METHOD, "kind": quantization.kind}
    return entry if quantization.kind == "int8" else entry | {"group_size": quantization.group_size}


def split_config(config: OPTConfig, where: Path) -> tuple[OPTConfig, Quantization | None]:
    """A config without its ``quantization_config``, and what that says.

    Raises:
      CheckpointError: it speaks of another library's quantization, or makes no sense.
    """
    extra = dict(config.extra)
    entry = json.loads(extra.pop("quantization_config", "null"))
    config = dataclasses.replace(config, extra=tuple(extra.items()))
    if not entry:
        return config, None
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method != METHOD:
        raise CheckpointError(
            f"{where} holds a checkpoint quantized by {shorten(str(method))!r}, which optjax does not read; "
            "load the original with quantization="
        )
    known = {field.name for field in dataclasses.fields(Quantization)}
    try:
        return config, Quantization(**{name: value for name, value in entry.items() if name in known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: quantization_config: {shorten(str(error))}") from None


@cache
def stored(quantization: Quantization, weight: Weight) -> QuantizedWeight | None:
    """The shapes and dtypes of a weight's codes and scales in a file; None for one that is not quantized."""
    kind = quantization.kind_of(weight)
    if kind is None:
        return None
    how = {"kind": kind, "group_size": quantization.group_size, "native": False, "table": is_table(weight)}
    make = partial(encode, dtype=jnp.float32, **how)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(weight.shape, jnp.float32))


def parts(weight: Weight, made: QuantizedWeight) -> tuple[Weight, Weight]:
    """Codes and scales as if they were weights of their own."""
    values, scales = made.axes(weight.axes)
    return (
        dataclasses.replace(weight, shape=tuple(made.values.shape), axes=values),
        dataclasses.replace(weight, path=weight.path + SCALE, shape=tuple(made.scales.shape), axes=scales),
    )


def read_quantized(
    place: Placer,
    platform: str,
    quantization: Quantization,
    weight: Weight,
    layer: int | None,
    values: TensorRef,
    scales: TensorRef,
    column_scales: TensorRef | None,
    dtype: Any,
) -> QuantizedWeight:
    """A weight from its codes and scales, placed as `place` has it."""
    made = stored(quantization, weight)
    assert made is not None
    of_values, of_scales = parts(weight, made)
    if made.kind == "int4" and platform == "tpu":
        values = Unpacked(values, made.group_size)
        of_values = dataclasses.replace(of_values, shape=values.shape)
    placed = {"values": place(of_values, layer, values, values.dtype)}
    placed |= {"scales": place(of_scales, layer, scales, scales.dtype), "column_scales": None}
    if column_scales is not None:
        path, axes = weight.path + COLUMN_SCALE, weight.axes[-1:]
        of_columns = dataclasses.replace(weight, path=path, shape=weight.shape[-1:], axes=axes)
        placed["column_scales"] = place(of_columns, layer, column_scales, column_scales.dtype)
    return dataclasses.replace(made, **placed, dtype=np.dtype(dtype))


@dataclass(frozen=True)
class Unpacked(TensorRef):
    """int4 codes as jax's own 4-bit integers ``[in, out]``, of a tensor that holds two in a byte.

    A block of it begins and ends with whole groups.
    """

    ref: TensorRef
    group_size: int
    dtype = np.dtype(jnp.int4)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (2 * self.ref.shape[0], self.ref.shape[1])

    def read(self, index: Index = ()) -> np.ndarray:
        (start, stop), columns = block(index, self.shape)
        packed = self.ref.read((slice(start // 2, stop // 2), slice(*columns)))
        return unpack_on_host(packed, self.group_size)


@dataclass
class LazyQuantized:
    """A weight that is read and quantized when its codes are asked for; scales are kept until their turn comes."""

    ref: TensorRef
    kind: str
    group_size: int
    table: bool
    advance: Callable[[int], None]
    kept: dict[str, np.ndarray] = field(default_factory=dict)

    def read_values(self) -> np.ndarray:
        array = jnp.asarray(self.ref.read())
        how = {"kind": self.kind, "group_size": self.group_size, "native": False, "table": self.table}
        made = encode_placed(array, dtype=array.dtype, **how)
        self.advance(self.ref.nbytes)
        parts = {"scales": made.scales, "column_scales": made.column_scales}
        self.kept = {name: np.asarray(part) for name, part in parts.items() if part is not None}
        return np.asarray(made.values)

    def read_scales(self, name: str) -> np.ndarray:
        """``"scales"`` or ``"column_scales"``, each once."""
        if name not in self.kept:
            self.read_values()
        return self.kept.pop(name)
