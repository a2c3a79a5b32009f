"""A frozen matrix with a low-rank one beside it: a pytree node that stands where the matrix would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from optjax.declaration import Axis
from optjax.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from optjax.params import Params

Axes = tuple[Axis, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "lora_A", "lora_B", "scale", "key"],
    meta_fields=["dropout"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """``W + scale · B A`` of a matrix W ``[out, in]``, never written out; or one of each layer, stacked ``[L, …]``.

    Attributes:
      base: W, quantized or not.
      lora_A: ``[r, in]``.
      lora_B: ``[out, r]``.
      scale: a float32 scalar, or ``[L]``.
      key: of the dropout of what goes into lora_A; None for none.
      dropout: its rate.
    """

    base: Any
    lora_A: Any
    lora_B: Any
    scale: Any
    key: Any = None
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def astype(self, dtype: Any) -> AdaptedWeight:
        """All three matrices in another dtype."""
        return self.map(lambda matrix: matrix.astype(dtype))

    def map(self, one: Callable[[Any], Any]) -> AdaptedWeight:
        """With ``one(matrix)`` in place of each of the three."""
        base, a, b = (one(matrix) for matrix in (self.base, self.lora_A, self.lora_B))
        return dataclasses.replace(self, base=base, lora_A=a, lora_B=b)

    def whole(self, dtype: Any = jnp.float32) -> jax.Array:
        """``W + scale · B A``, written out, in ``dtype``."""
        quantized = isinstance(self.base, QuantizedWeight)
        base = self.base.dequantize(jnp.float32) if quantized else self.base.astype(jnp.float32)
        return (base + delta(self.lora_A, self.lora_B, self.scale)).astype(dtype)


def delta(a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
    """``scale · B A`` ``[…, out, in]`` in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return jnp.asarray(scale, jnp.float32)[..., None, None] * product


def low_rank_axes(axes: Axes) -> tuple[Axes, Axes]:
    """The logical axes of lora_A and lora_B, from those of the matrix.

    Each has what splits its long dimension in the matrix. Where that is the matrix's rows by heads, or by the
    feed-forward's values, and within these by what splits the model's weights, lora_A's columns are by the latter too.
    """
    n_out, n_in = axes
    inside = () if n_in is None else (n_in,) if isinstance(n_in, str) else n_in
    outside = () if n_out is None else (n_out,) if isinstance(n_out, str) else n_out
    if "model" in outside and "model" not in inside:
        inside = (*inside, "model")
    return (None, inside or None), (outside or None, None)


def is_adapted(params: Params) -> bool:
    """Whether any weight has an adapter."""
    leaves = jax.tree.leaves(params.weights, is_leaf=lambda leaf: isinstance(leaf, AdaptedWeight))
    return any(isinstance(leaf, AdaptedWeight) for leaf in leaves)


def check_not_adapted(params: Params, what: str) -> None:
    """ValueError where weights have adapters beside them, of which ``what`` knows nothing."""
    if is_adapted(params):
        raise ValueError(
            f"these params have adapters, which {what}; take the params without them (adapters are a tree of their "
            "own), or optjax.merge_adapters"
        )


def with_dropout(weights: Any, key: jax.Array | None) -> Any:
    """Weights whose adapters drop some of their inputs, each by a key of its own; as they are without a key."""
    if key is None:
        return weights
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda leaf: isinstance(leaf, AdaptedWeight))
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, AdaptedWeight) and leaf.dropout > 0:
            leaves[i] = dataclasses.replace(leaf, key=jax.random.fold_in(key, i))
    return jax.tree.unflatten(tree, leaves)
