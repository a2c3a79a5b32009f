"""What the model does where its params are spread over a mesh, and leaves out where they are not.

``params.placement`` is None, or an ``optjax.sharding.Placement``; optjax itself only asks it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from optjax.lora.weight import AdaptedWeight, low_rank_axes
from optjax.quantization.observed import Observed
from optjax.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from optjax.sharding import Placement


# The compute capability from which GPUs have bfloat16, and XLA's Triton kernels: T4 and V100 are older.
AMPERE = 8.0


def platform(placement: Placement | None) -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: where the params are, or else jax's default."""
    return jax.default_backend() if placement is None else placement.platform


def compute_capability(placement: Placement | None) -> float | None:
    """That of the NVIDIA GPU that the params are on; None on any other device."""
    device = jax.local_devices()[0] if placement is None else placement.mesh.devices.flat[0]
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # a GPU of AMD has a name there
        return None


def parts(placement: Placement | None, size: int, axis: str) -> int:
    """The number of parts that a dimension of an activation is split into, by its logical axis."""
    return 1 if placement is None else placement.parts(size, axis)


def in_parts(placement: Placement | None, x: jax.Array) -> jax.Array:
    """Tokens ``[B, T, …]`` as ``[P, B/P, Q, T/Q, …]``, by the parts that rows and their lengths are split into."""
    return x[None, :, None] if placement is None else placement.in_parts(x)


def constrain(placement: Placement | None, x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation, with the logical axis of each dimension."""
    return x if placement is None else placement.constrain(x, axes)


def constrain_both(placement: Placement | None, x: jax.Array, axes: Any, back: Any) -> jax.Array:
    """An activation as by `constrain`, and its cotangent with axes of its own."""
    return x if placement is None else placement.constrain_both(x, axes, back)


def on_each(placement: Placement | None, function: Any, arrays: Any, axes: Any, out_axes: Any) -> jax.Array:
    """``function(*arrays)`` of each device's own parts, split by logical axes; the result has the first one's shape."""
    return function(*arrays) if placement is None else placement.on_each(function, arrays, axes, out_axes)


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Resident:
    """A matrix ``[out, in]`` that is not gathered: it stays in its parts, and the tokens come to these.

    Pope et al. 2022 (Efficiently Scaling Transformer Inference), section 3.2, call it weight-stationary.
    """

    weight: Any
    axes: Any

    def astype(self, dtype: Any) -> Resident:
        return dataclasses.replace(self, weight=self.weight.astype(dtype))


def tokens_travel(placement: Placement | None, shape: tuple[int, ...], width: int) -> bool:
    """Whether it is tokens ``[B, T]`` that should travel, not the weights of a layer of that width."""
    return placement is not None and placement.tokens_travel(shape, width)


def gather(placement: Placement | None, weights: Any, axes: Any, stay: bool = False) -> Any:
    """Weights as they are used, from a nested dict of them and the same of their logical axes.

    With ``stay`` a matrix that is split by what splits the tokens is not gathered, but a `Resident`.
    """
    if placement is None or weights is None:
        return weights
    if isinstance(weights, dict):
        return {name: gather(placement, weight, axes[name], stay) for name, weight in weights.items()}
    if isinstance(weights, Observed):
        return weights.map(lambda weight: gather(placement, weight, axes, stay))
    if stay and len(axes) == 2 and placement.stays(axes) and _may_stay(placement, weights):
        return Resident(weights, axes)
    if isinstance(weights, QuantizedWeight):
        return weights.map_with_axes(placement.gather, axes)
    if isinstance(weights, AdaptedWeight):
        of_a, of_b = low_rank_axes(axes)
        a, b = placement.gather_as_fits(weights.lora_A, of_a), placement.gather_as_fits(weights.lora_B, of_b)
        return dataclasses.replace(weights, base=gather(placement, weights.base, axes, stay), lora_A=a, lora_B=b)
    return placement.gather(weights, axes)


def _may_stay(placement: Placement, weight: Any) -> bool:
    # On TPU codes of 4 bits, which stand the other way round, are split along the other dimension.
    other_way = isinstance(weight, QuantizedWeight) and weight.kind != "int8" and placement.platform == "tpu"
    return not (isinstance(weight, AdaptedWeight) or other_way)  # of an adapted weight it is the base that stays


def cast(weight: jax.Array, dtype: Any) -> jax.Array:
    """``weight.astype(dtype)``, in a form that the compilers leave where it is, before the weight is gathered.

    A plain cast they move: on TPU that of a layer's slice to before the loop over layers, as another copy of all
    weights, whatever the barrier says; on GPU, but for the barrier, to after the gather, which then moves float32.
    """
    if jnp.dtype(dtype).itemsize < weight.dtype.itemsize:
        info = jnp.finfo(dtype)
        weight = jax.lax.reduce_precision(weight, info.nexp, info.nmant)
        return jax.lax.optimization_barrier(weight.astype(dtype))
    return weight.astype(dtype)
