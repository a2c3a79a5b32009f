"""Params whose weights are still in their files: what `save_params` needs to write a checkpoint larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from optjax.checkpoints.open import Opened
from optjax.checkpoints.tensors import TensorRef
from optjax.declaration import Weight
from optjax.params import Params, build_params


@dataclass(frozen=True)
class LazyTensor:
    """A weight that numpy reads from its file each time it asks for the values.

    Attributes:
      ref: where it is.
      dtype: what it is cast to.
      advance: told the bytes read, for a progress bar.
    """

    ref: TensorRef
    dtype: np.dtype
    advance: Callable[[int], None]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.ref.read().astype(self.dtype if dtype is None else dtype, copy=False)
        self.advance(self.ref.nbytes)
        return array


def lazy_params(opened: Opened, dtype: Any, advance: Callable[[int], None]) -> Params:
    """The params of a checkpoint as `LazyTensor`; ``dtype`` None keeps the file's, as `load_params` does."""

    def leaf(weight: Weight, layer: int | None) -> LazyTensor:
        ref = opened.plan.tensors[weight.path, layer]
        wanted = jax.dtypes.canonicalize_dtype(ref.dtype if dtype is None else dtype)
        return LazyTensor(ref, np.dtype(wanted), advance)

    return build_params(opened.config, opened.head, leaf)
