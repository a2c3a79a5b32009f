"""Params whose weights are still in their files: what `save_params` needs to write a checkpoint larger than memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from optjax.checkpoints.open import Opened
from optjax.checkpoints.quantized import LazyQuantized, stored
from optjax.checkpoints.tensors import TensorRef
from optjax.declaration import Weight
from optjax.params import Params, build_params
from optjax.quantization.quantize import Quantization, is_table


@dataclass(frozen=True)
class LazyTensor:
    """A weight, or a part of one, that numpy reads from its file each time it asks for the values.

    Attributes:
      shape, dtype: of the values.
      values: reads them; in any dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values().astype(self.dtype if dtype is None else dtype, copy=False)


def lazy_params(
    opened: Opened, dtype: Any, advance: Callable[[int], None], quantization: Quantization | None = None
) -> Params:
    """The params of a checkpoint as `LazyTensor`; arguments as of `load_params`, ``advance`` is told the bytes read.

    Raises:
      ValueError: the checkpoint is quantized already.
    """
    held = opened.quantization
    if quantization is not None and held is not None:
        raise ValueError(f"this checkpoint is quantized already, to {held.kind}; quantize the original")
    meant = np.dtype(jax.dtypes.canonicalize_dtype(opened.dtype if dtype is None else dtype))

    def lazy(ref: TensorRef, dtype: Any) -> LazyTensor:
        def values() -> np.ndarray:
            array = ref.read()
            advance(ref.nbytes)
            return array

        return LazyTensor(ref.shape, np.dtype(jax.dtypes.canonicalize_dtype(dtype)), values)

    def leaf(weight: Weight, layer: int | None) -> Any:
        ref = opened.plan.tensors[weight.path, layer]
        made = None if (held or quantization) is None else stored(held or quantization, weight)
        if made is None:
            return lazy(ref, ref.dtype if dtype is None else dtype)
        if held is not None:
            scales = opened.plan.scales[weight.path, layer]
            columns = opened.plan.column_scales.get((weight.path, layer))
            return dataclasses.replace(
                made,
                values=lazy(ref, ref.dtype),
                scales=lazy(scales, scales.dtype),
                column_scales=None if columns is None else lazy(columns, columns.dtype),
                dtype=meant,
            )
        own = LazyQuantized(ref, made.kind, made.group_size, is_table(weight), advance)

        def read(name: str) -> LazyTensor | None:
            like = getattr(made, name)
            return None if like is None else LazyTensor(like.shape, like.dtype, partial(own.read_scales, name))

        return dataclasses.replace(
            made,
            values=LazyTensor(made.values.shape, made.values.dtype, own.read_values),
            scales=read("scales"),
            column_scales=read("column_scales"),
            dtype=meant,
        )

    return build_params(opened.config, opened.head, leaf)
