"""Params with adapters beside their weights, or added into them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.declaration import Weight, declare
from optjax.lora.layout import place_adapters
from optjax.lora.parts import LOW_RANK, Adapters, module_path, walk
from optjax.lora.weight import AdaptedWeight, check_not_adapted, delta
from optjax.params import Params


def with_adapters(params: Params, adapters: Adapters) -> Params:
    """The params with the adapters beside their weights: every function takes them as it takes others.

    Nothing is copied: the base weights are those of ``params``, quantized or not, and the products go ``W x`` and
    ``B (A x)``. Differentiate by the adapters and no gradient of the base is made::

        loss = lambda adapters: optjax.causal_lm(optjax.with_adapters(params, adapters), ids, labels=ids).loss
        gradients = jax.grad(loss)(adapters)

    ``lora_dropout`` is on where such a function is given a ``dropout_key``.

    Args:
      params: stacked or not, on a mesh or not, quantized or not; their layers may lie in the host's memory.
      adapters: of `init_adapters` or `load_adapters`, stacked or not. They are laid out as the params are.

    Raises:
      ValueError: adapters of another model, params that have adapters, or layers on disk.
    """
    check_fit(params, adapters)
    if params.offload is not None and params.offload.memory == "disk":
        raise ValueError("adapters do not go with offload='disk'; load with offload='host', or merge them on disk")
    adapters = place_adapters(adapters, params)
    dropout = adapters.config.lora_dropout

    def beside(weight: Weight, layer: int | None, base: Any, own: dict[str, Any]) -> Any:
        scale = _scale(params, adapters, weight, layer)
        return AdaptedWeight(base, own["lora_A"], own["lora_B"], scale, None, dropout)

    return _changed(params, adapters, beside)


def merge_adapters(params: Params, adapters: Adapters) -> Params:
    """Plain params of the same function: ``W + scale · B A`` in place of each adapted W, in its dtype.

    Args:
      params: stacked or not, on a mesh or not; not quantized.

    Raises:
      ValueError: adapters of another model; quantized params, which would lose what is added to rounding.
    """
    return _merged(params, adapters, 1.0)


def unmerge_adapters(params: Params, adapters: Adapters) -> Params:
    """The params that `merge_adapters` made these of, but for rounding.

    Raises:
      ValueError: as `merge_adapters`; adapters that hold whole weights or biases, in place of which nothing is known.
    """
    whole = [".".join((*path, name)) for path, _, own in walk(adapters) for name in own if name not in LOW_RANK]
    if whole:
        raise ValueError(f"these adapters hold all of {whole[0]}: what stood there before is not known; load it again")
    return _merged(params, adapters, -1.0)


def _merged(params: Params, adapters: Adapters, sign: float) -> Params:
    check_fit(params, adapters)
    if params.quantization is not None:
        raise ValueError(
            f"these params are quantized to {params.quantization.kind}, and what is merged would be lost to rounding: "
            "merge into the original, or into optjax.dequantize of these, and quantize the result"
        )
    if params.offload is not None:
        raise ValueError("merge before layers are offloaded: load them without offload=")
    adapters = place_adapters(adapters, params)

    def into(weight: Weight, layer: int | None, base: Any, own: dict[str, Any]) -> Any:
        scale = sign * _scale(params, adapters, weight, layer)
        sharding = None
        if params.placement is not None:
            lead = (None,) if params.stacked and weight.per_layer else ()
            sharding = params.placement.sharding((*lead, *weight.axes))
        return _add(base, own["lora_A"], own["lora_B"], scale, sharding)

    return _changed(params, adapters, into)


@partial(jax.jit, static_argnums=4)
def _add(base: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, sharding: Any) -> jax.Array:
    made = (base.astype(jnp.float32) + delta(a, b, scale)).astype(base.dtype)
    return made if sharding is None else jax.lax.with_sharding_constraint(made, sharding)


def check_fit(params: Any, adapters: Any) -> None:
    """ValueError unless the adapters are for such params, and these have none."""
    if not isinstance(params, Params):
        raise ValueError(f"params should be what init_params or load_params return, not {type(params).__name__}")
    if not isinstance(adapters, Adapters):
        raise ValueError(
            f"adapters should be what init_adapters or load_adapters return, not {type(adapters).__name__}"
        )
    check_not_adapted(params, "get no second ones")
    config = params.config
    shapes = {weight.path: weight.shape for weight in declare(config, params.head)}
    for path, layer, own in walk(adapters):
        name = ".".join(path)
        where = name if layer is None else name.replace("layers", f"layers.{layer}", 1)
        if layer is not None and layer >= config.num_hidden_layers:
            raise ValueError(f"the adapters have {where}, and the model has {config.num_hidden_layers} layers")
        for leaf, array in own.items():
            shape = shapes.get(f"{name}.{'weight' if leaf in LOW_RANK else leaf}")
            if shape is None:
                raise ValueError(
                    f"the adapters have {where}.{leaf}, and a model of this config with head {params.head!r} has "
                    f"nothing there; they were made for head {adapters.head!r}"
                )
            found = tuple(array.shape)
            if adapters.stacked and path[0] == "layers":
                shape, found = (config.num_hidden_layers, *shape), found
            if leaf in LOW_RANK:
                kept = slice(-1, None) if leaf == "lora_A" else slice(-2, -1)
                fits = len(found) == len(shape) and found[:-2] == shape[:-2] and found[kept] == shape[kept]
            else:
                fits = found == shape
            if not fits:
                raise ValueError(f"{where}.{leaf} {found} does not fit the model's weight {shape}: another size?")


def _scale(params: Params, adapters: Adapters, weight: Weight, layer: int | None) -> Any:
    """A float32 scalar; ``[L]`` for stacked layers."""
    config, head = adapters.config, adapters.head
    if weight.per_layer and layer is None:
        layers = range(params.config.num_hidden_layers)
        return np.array([config.scaling(module_path(weight, i, head)) for i in layers], np.float32)
    return np.float32(config.scaling(module_path(weight, layer, head)))


def _changed(params: Params, adapters: Adapters, low_rank: Any) -> Params:
    """Params with the adapters' whole weights in place of theirs, and ``low_rank(weight, layer, base, own)``."""
    declared = {weight.path: weight for weight in declare(params.config, params.head)}

    def module(path: tuple[str, ...], layer: int | None, base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        made = base | {name: value for name, value in own.items() if name not in LOW_RANK}
        if "embed_tokens" in path:  # its dtype is that of the computation
            made = {name: value.astype(params.dtype) for name, value in made.items()}
        if "lora_A" in own:
            weight = declared[".".join((*path, "weight"))]
            made["weight"] = low_rank(weight, layer, base["weight"], own)
        return made

    weights = dict(params.weights)
    if not params.stacked:
        weights["layers"] = list(weights["layers"])
    for path, layer, own in walk(adapters):
        steps: tuple[Any, ...] = path if layer is None else (path[0], layer, *path[1:])
        _replace(weights, steps, lambda base, p=path, i=layer, o=own: module(p, i, base, o))
    return dataclasses.replace(params, weights=weights)


def _replace(tree: Any, steps: tuple[Any, ...], change: Any) -> None:
    """``change`` of the node at ``steps`` in its place; what is on the way is copied first, so nobody else sees it."""
    first, *rest = steps
    node = tree[first]
    if not rest:
        tree[first] = change(node)
        return
    tree[first] = dict(node) if isinstance(node, dict) else list(node)
    _replace(tree[first], tuple(rest), change)
