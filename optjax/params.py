"""The parameters: a pytree of weights with the config riding along as static data."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optjax.config import OPTConfig
from optjax.declaration import Weight, declare

if TYPE_CHECKING:
    from optjax.offloading import Offload
    from optjax.quantization.quantize import Quantization
    from optjax.sharding import Placement

SCHEMES = ("hf", "paper")
# Of weights. Those of 8 bits and less need scales, which quantization has.
FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, jnp.bfloat16))


@partial(
    jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["config", "head", "placement", "offload"]
)
@dataclasses.dataclass(frozen=True)
class Params:
    """The weights of a model: a pytree whose leaves are arrays.

    ``weights`` is nested by Hugging Face's names (``params["layers"][0]["fc1"]["weight"]``, ``[out, in]``). The layers
    stand in a list, one dict each (the layout for decoding), or in one dict whose leaves have a leading ``L`` axis (the
    layout for training with scan); `stack_layers` and `unstack_layers` go from one to the other. ``offload`` is None or
    says where layers lie that are not on the device (`optjax.offload`).
    """

    weights: dict[str, Any]
    config: OPTConfig
    head: str | None = "causal_lm"
    placement: Placement | None = None
    offload: Offload | None = None

    def __getitem__(self, name: str) -> Any:
        return self.weights[name]

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked ``[L, …]``."""
        return isinstance(self.weights["layers"], dict)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the word embeddings, which is the dtype the model computes in."""
        return self.weights["embed_tokens"]["weight"].dtype

    @property
    def quantization(self) -> Quantization | None:
        """How the weights are quantized; None where they are not."""
        from optjax.quantization.quantize import quantization_of

        return quantization_of(self)

    def layer(self, i: int) -> dict[str, Any]:
        """The weights of layer ``i``, whichever layout they are in."""
        layers = self.weights["layers"]
        return jax.tree.map(lambda w: w[i], layers) if self.stacked else layers[i]


def build_params(
    config: OPTConfig,
    head: str | None,
    leaf: Callable[[Weight, int | None], Any],
    *,
    stacked: bool = False,
    placement: Placement | None = None,
) -> Params:
    """Params whose every leaf is ``leaf(weight, layer)``.

    ``layer`` is None for a weight outside the layers, and for all layers of a weight at once where ``stacked``.
    """
    weights = declare(config, head)
    tree: dict[str, Any] = {} if stacked else {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for weight in weights:
        for layer in range(config.num_hidden_layers) if weight.per_layer and not stacked else (None,):
            *steps, last = weight.keys(layer)
            node: Any = tree
            for step in steps:
                node = node[step] if isinstance(step, int) else node.setdefault(step, {})
            node[last] = leaf(weight, layer)

    return Params(tree, config, head, placement)


def abstract_params(
    config: OPTConfig,
    dtype: Any = jnp.float32,
    head: str | None = "causal_lm",
    *,
    stacked: bool = False,
    mesh: Any = None,
    rules: Any = None,
) -> Params:
    """The params as ``jax.ShapeDtypeStruct``: for ahead-of-time compilation, restoring and planning.

    With ``mesh`` and ``rules``, as for `init_params`, each has its sharding.
    """
    placement = as_placement(mesh, rules, config, head)

    def leaf(weight: Weight, layer: int | None) -> jax.ShapeDtypeStruct:
        shape = (config.num_hidden_layers, *weight.shape) if weight.per_layer and stacked else weight.shape
        return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(placement, weight, stacked))

    return build_params(config, head, leaf, stacked=stacked, placement=placement)


def init_params(
    config: OPTConfig,
    key: jax.Array,
    dtype: Any = jnp.float32,
    head: str | None = "causal_lm",
    *,
    stacked: bool = False,
    scheme: str = "hf",
    mesh: Any = None,
    rules: Any = None,
) -> Params:
    """Random params.

    Args:
      config: the architecture.
      key: a jax PRNG key. The same key gives the same weights, stacked or not.
      dtype: of all weights, a floating type.
      head: ``"causal_lm"``, ``"sequence_classification"``, ``"question_answering"`` or None.
      stacked: layers stacked ``[L, …]`` rather than in a list.
      scheme: ``"hf"`` draws every matrix from N(0, init_std), as transformers does; ``"paper"`` scales the layers that
        write to the residual stream by 1/√(2L) (Zhang et al. 2022, section 2.2). Biases are 0, norms 1, the
        embedding of ``pad_token_id`` 0 under ``"hf"``.
      mesh, rules: spread the weights over devices (see ``optjax.sharding``). Each is made where it lies, and is the
        same that it would be on one device.

    Raises:
      ValueError: unknown head or scheme, a dtype that is not floating, something that is not a key, or rules that do
        not fit.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"no initialization scheme {scheme!r}; there are: {', '.join(SCHEMES)}")
    key, dtype = as_key(key), floating_dtype(dtype)
    placement = as_placement(mesh, rules, config, head)

    def leaf(weight: Weight, layer: int | None) -> jax.Array:
        # Keys come from the weight's name, so that adding a weight does not change the others.
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(weight.path.encode())))
        if layer is not None:
            own = jax.random.fold_in(own, layer)
        elif weight.per_layer:
            own = jax.vmap(jax.random.fold_in, (None, 0))(own, np.arange(config.num_hidden_layers))
        return init_weight(config, weight, own, dtype, scheme, placement)

    return build_params(config, head, leaf, stacked=stacked, placement=placement)


def init_weight(
    config: OPTConfig,
    weight: Weight,
    key: jax.Array,
    dtype: Any,
    scheme: str = "hf",
    placement: Placement | None = None,
) -> jax.Array:
    """One fresh weight by its declared kind, or one for each of the keys ``[L]``, stacked. See `init_params`."""
    shape = (*key.shape, *weight.shape)
    sharding = _sharding(placement, weight, stacked=key.ndim > 0)
    if weight.kind in ("bias", "norm_bias"):
        return jnp.zeros(shape, dtype, device=sharding)
    if weight.kind == "norm_weight":
        return jnp.ones(shape, dtype, device=sharding)
    std = config.init_std
    if scheme == "paper" and weight.kind == "output":
        std /= (2 * config.num_hidden_layers) ** 0.5
    pads = scheme == "hf" and weight.path == "embed_tokens.weight"
    zero_row = config.pad_token_id if pads else None
    return _normal(key, std, weight.shape, dtype, zero_row, sharding)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _normal(
    key: jax.Array, std: Any, shape: tuple[int, ...], dtype: Any, zero_row: int | None, sharding: Any
) -> jax.Array:
    """N(0, std²); a small program for each shape, as one for the whole model would take long to compile."""

    def draw(key: jax.Array) -> jax.Array:
        # Drawn in float32, then cast: every dtype gets the same numbers.
        value = std * jax.random.normal(key, shape, jnp.float32)
        if zero_row is not None:
            value = value.at[zero_row].set(0.0, mode="drop")
        return value.astype(dtype)

    value = jax.vmap(draw)(key) if key.ndim else draw(key)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


def stack_layers(params: Params) -> Params:
    """The same params with layers stacked ``[L, …]``: the layout `forward` scans over. Works on abstract leaves too.

    Offloaded layers stay as they are.
    """
    if params.stacked or params.offload is not None:
        return params

    def stack(*leaves):
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            sharding = stacked_sharding(leaves[0].sharding)
            return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype, sharding=sharding)
        stacked = jnp.stack(leaves)
        if params.placement is None or isinstance(stacked, Tracer):
            return stacked
        return jax.device_put(stacked, stacked_sharding(leaves[0].sharding))

    layers = jax.tree.map(stack, *params["layers"])
    return dataclasses.replace(params, weights=params.weights | {"layers": layers})


def unstack_layers(params: Params) -> Params:
    """The same params with layers in a list, one dict each: the layout `generate` is fastest with.

    Offloaded layers stay as they are.
    """
    if not params.stacked or params.offload is not None:
        return params

    def take(i: int):
        def one(leaf):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                sharding = _sharding_of_one(leaf.sharding)
                return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
            return leaf[i]

        return one

    layers = [jax.tree.map(take(i), params["layers"]) for i in range(params.config.num_hidden_layers)]
    return dataclasses.replace(params, weights=params.weights | {"layers": layers})


def floating_dtype(dtype: Any) -> np.dtype:
    """A floating dtype of 16 bits or more from anything that names one.

    Raises:
      ValueError: it names none.
    """
    try:
        made = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        made = None
    if made is None or made not in FLOATS:
        raise ValueError(f"expected a floating dtype such as jnp.bfloat16, got {dtype!r}")
    if jax.dtypes.canonicalize_dtype(made) != made:
        raise ValueError(f"jax computes in {made} only with jax_enable_x64 on; use float32 or turn it on")
    return made


def wider(a: Any, b: Any) -> np.dtype:
    """The dtype that holds what two others do, also where ``jax_numpy_dtype_promotion`` forbids to go there unasked."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def as_key(key: Any) -> jax.Array:
    """A typed PRNG key, from one or from the older uint32 form.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.ndim == 1:
        try:
            return jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError as error:
            raise ValueError(f"not the data of a PRNG key: {error}") from None
    raise ValueError(f"expected a PRNG key such as jax.random.key(0), got {type(key).__name__}")


def as_placement(mesh: Any, rules: Any, config: OPTConfig, head: str | None) -> Placement | None:
    """`optjax.sharding.make_placement`, which is imported only where there is a mesh."""
    if mesh is None and rules is None:
        return None
    from optjax.sharding import make_placement

    return make_placement(mesh, rules, config, head)


def _sharding(placement: Placement | None, weight: Weight, stacked: bool) -> jax.sharding.NamedSharding | None:
    """The sharding of a weight of one layer, or of all layers ``[L, …]``."""
    if placement is None:
        return None
    return placement.sharding((None, *weight.axes) if stacked and weight.per_layer else weight.axes)


def stacked_sharding(sharding: Any) -> Any:
    """Of layers stacked ``[L, …]``: that of one layer, L on all devices."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding


def _sharding_of_one(sharding: Any) -> Any:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding
