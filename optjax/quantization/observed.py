"""A matrix that tells what it is multiplied with: a pytree node that stands where the matrix would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["see"])
@dataclasses.dataclass(frozen=True)
class Observed:
    """A matrix, quantized or not, and what is called with its inputs ``[…, in]`` while a program is traced.

    It is made and forgotten within one trace: what it sees belongs to that.
    """

    weight: Any
    see: Callable[[jax.Array], None]

    def astype(self, dtype: Any) -> Observed:
        return self.map(lambda weight: weight.astype(dtype))

    def map(self, one: Callable[[Any], Any]) -> Observed:
        """With ``one(matrix)`` in place of the matrix."""
        return dataclasses.replace(self, weight=one(self.weight))
