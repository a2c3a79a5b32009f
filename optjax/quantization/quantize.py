"""Which weights are quantized, and params from one form to the other."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optjax.config import OPTConfig
from optjax.declaration import Axis, Weight, declare
from optjax.lora.weight import check_not_adapted
from optjax.params import Params, build_params
from optjax.placed import platform
from optjax.quantization.codes import KINDS
from optjax.quantization.weight import QuantizedWeight, encode

if TYPE_CHECKING:
    from optjax.sharding import Placement

GROUP_SIZE = 64  # QLoRA's
_HEADS = ("score.", "qa_outputs.")
_TABLES = ("embed_tokens.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a model's weights are quantized.

    Attributes:
      kind: ``"int8"`` (8 bits, a scale for each output), ``"int4"`` or ``"nf4"`` (4 bits, a scale for each group).
      group_size: inputs that share a scale in the 4-bit kinds, even (of int8 always the default). Smaller groups are
        more exact and take 16 bits more each. A last group may be short; where the inputs are split over devices, each
        has whole groups.

    Raises:
      ValueError: there is no such kind, or a group size that makes no sense.
    """

    kind: str
    group_size: int = GROUP_SIZE

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"no quantization {self.kind!r}; there are: {', '.join(KINDS)}")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 2 or size % 2:
            raise ValueError(f"group_size should be an even number of at least 2, not {size!r}")
        # int8 has no groups: whatever is said of them, it is the same.
        object.__setattr__(self, "group_size", GROUP_SIZE if self.kind == "int8" else int(size))

    def kind_of(self, weight: Weight) -> str | None:
        """What becomes of a weight; None where it stays as it is.

        The layers' matrices and the projections get ``kind``. The word embedding and an untied head get int8 at most,
        as they decide which token is meant. Position embeddings, classifiers, biases and norms stay: they are small.
        """
        if is_table(weight):
            return "int8"
        if weight.kind in ("linear", "output") and not weight.path.startswith(_HEADS):
            return self.kind
        return None


def is_table(weight: Weight) -> bool:
    """Whether it is one with a row for each token: these have scales of columns, too."""
    return weight.path in _TABLES


def as_quantization(value: Any) -> Quantization | None:
    """A `Quantization`, from one or from the name of a kind; None stays.

    Raises:
      ValueError: it is neither.
    """
    if value is None or isinstance(value, Quantization):
        return value
    if isinstance(value, str):
        return Quantization(value)
    kinds = ", ".join(map(repr, KINDS))
    raise ValueError(f"quantization should be {kinds} or a Quantization, not {type(value).__name__}")


def quantize(params: Params, quantization: str | Quantization = "int8") -> Params:
    """The same params with their matrices in 8 or 4 bits, where they lie; see `Quantization.kind_of` for which.

    Every function but training takes them as it takes others: `forward`, the heads, `generate`, `stream`. Biases, norms
    and all computation stay in the dtype of ``params``. ``load_params(…, quantization=…)`` never holds the others.

    Args:
      params: stacked or not, on a mesh or not; abstract ones too.
      quantization: ``"int8"``, ``"int4"``, ``"nf4"``, or a `Quantization`.

    Raises:
      ValueError: no such quantization, params that are quantized already, or groups that do not divide over devices.
    """
    made = check_quantizable(params, quantization)

    def leaf(weight: Weight, layer: int | None) -> Any:
        array = _get(params, weight, layer)
        return quantize_weight(made, weight, array, params.placement, array.dtype)

    return build_params(params.config, params.head, leaf, stacked=params.stacked, placement=params.placement)


def check_quantizable(params: Any, quantization: Any) -> Quantization:
    """The quantization that is meant, of params that may have it; or a ValueError, as of `quantize`."""
    made = as_quantization(quantization)
    if not isinstance(params, Params):
        raise ValueError(f"params should be what init_params or load_params return, not {type(params).__name__}")
    if made is None:
        raise ValueError(f"give a quantization: {', '.join(map(repr, KINDS))}")
    if is_quantized(params):
        raise ValueError("these params are quantized already; dequantize them first, or load them anew")
    _check_not_offloaded(params)
    check_not_adapted(params, "are not quantized with them")
    return made


def dequantize(params: Params, dtype: Any = None) -> Params:
    """The same params with every matrix in ``dtype``, by default the one that it stood for; where they lie.

    Raises:
      ValueError: the params are not quantized.
    """
    if not is_quantized(params):
        raise ValueError("these params are not quantized")
    _check_not_offloaded(params)
    check_not_adapted(params, "are not dequantized with them")

    def leaf(weight: Weight, layer: int | None) -> Any:
        array = _get(params, weight, layer)
        if not isinstance(array, QuantizedWeight):
            return array if dtype is None else array.astype(dtype)
        sharding = None
        if params.placement is not None:
            sharding = params.placement.sharding(_axes(weight, array.ndim))
        return _dequantize(array.astype(dtype or array.dtype), sharding)

    return build_params(params.config, params.head, leaf, stacked=params.stacked, placement=params.placement)


def _check_not_offloaded(params: Params) -> None:
    from optjax.offloading import check_not_offloaded

    check_not_offloaded(params, "weights are not quantized or dequantized")


def is_quantized(params: Params) -> bool:
    """Whether any weight is."""
    return quantization_of(params) is not None


def quantization_of(params: Params) -> Quantization | None:
    """How params are quantized; None where they are not."""
    if params.offload is not None:
        return params.offload.quantization
    layers = params.weights["layers"]
    leaves = jax.tree.leaves(layers if params.stacked else layers[0], is_leaf=lambda x: isinstance(x, QuantizedWeight))
    weight = next((leaf for leaf in leaves if isinstance(leaf, QuantizedWeight)), None)
    if weight is None:
        return None
    return Quantization(weight.kind) if weight.kind == "int8" else Quantization(weight.kind, weight.group_size)


def quantize_weight(
    quantization: Quantization,
    weight: Weight,
    array: Any,
    placement: Placement | None,
    dtype: Any,
    scales: jax.Array | None = None,
) -> Any:
    """One weight as `Quantization.kind_of` has it, standing for ``dtype``: a `QuantizedWeight`, or the array itself.

    ``array`` is ``[out, in]`` or stacked, in any floating dtype, or abstract; ``scales`` may be given, but for tables.
    """
    kind = quantization.kind_of(weight)
    if kind is None:
        return array
    check_groups(quantization, weight, placement)
    native = platform(placement) == "tpu"
    how = {"kind": kind, "group_size": quantization.group_size, "native": native, "table": is_table(weight)}
    make = partial(encode, dtype=dtype, **how)
    shape, shardings = jax.eval_shape(make, array), None
    if placement is not None:
        shardings = shape.map_with_axes(lambda _, axes: placement.sharding(axes), _axes(weight, len(array.shape)))
    if not isinstance(array, jax.ShapeDtypeStruct):
        return encode_placed(array, scales, dtype=np.dtype(dtype), shardings=shardings, **how)
    if shardings is None:
        return shape
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shape, shardings)


def check_groups(quantization: Quantization, weight: Weight, placement: Placement | None) -> None:
    """ValueError unless every device has whole groups of a weight."""
    if placement is None or quantization.kind_of(weight) in ("int8", None):
        return
    n_in, axis, size = weight.shape[-1], weight.axes[-1], quantization.group_size
    shards = placement.shards(axis)
    if shards > 1 and n_in % (shards * size):
        raise ValueError(
            f"{weight.path} {weight.shape}: {n_in} inputs over {shards} devices are no whole groups of {size}; "
            f"choose a group_size that divides {n_in // shards}, or a mesh that does not split {axis!r}"
        )


def check_placement(
    quantization: Quantization | None, config: OPTConfig, head: str | None, placement: Placement | None
) -> None:
    """`check_groups` of every weight of a model, before any is read."""
    if quantization is not None:
        for weight in declare(config, head):
            check_groups(quantization, weight, placement)


@partial(jax.jit, static_argnames=("kind", "group_size", "dtype", "native", "table", "shardings"))
def encode_placed(
    array: jax.Array,
    scales: jax.Array | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: Any,
    native: bool,
    table: bool,
    shardings: Any = None,
) -> QuantizedWeight:
    """`encode` as one program, its result where ``shardings`` say."""
    made = encode(array, kind, group_size, dtype, native=native, table=table, scales=scales)
    return made if shardings is None else jax.lax.with_sharding_constraint(made, shardings)


@partial(jax.jit, static_argnums=1)
def _dequantize(weight: QuantizedWeight, sharding: Any) -> jax.Array:
    made = weight.dequantize()
    return made if sharding is None else jax.lax.with_sharding_constraint(made, sharding)


def _axes(weight: Weight, ndim: int) -> tuple[Axis, ...]:
    return (None, *weight.axes) if ndim > len(weight.axes) else weight.axes


def _get(params: Params, weight: Weight, layer: int | None) -> Any:
    node: Any = params.weights
    for key in weight.keys(layer):
        node = node[key]
    return node
