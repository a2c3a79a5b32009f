"""How adapters are laid out: layers in a list or stacked, on one device or over a mesh, as their params are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optjax.config import OPTConfig
from optjax.declaration import declare
from optjax.lora.parts import LOW_RANK, Adapters
from optjax.lora.weight import low_rank_axes
from optjax.params import Params

if TYPE_CHECKING:
    from optjax.sharding import Placement


def stack_adapters(adapters: Adapters, config: OPTConfig) -> Adapters:
    """The same with layers stacked ``[L, …]``; zeros where a layer has none, or a smaller rank.

    Raises:
      ValueError: a weight is trained whole in some layers only, which no stack can hold.
    """
    if adapters.stacked or "layers" not in adapters.weights:
        return adapters
    layers = adapters["layers"] + [{}] * (config.num_hidden_layers - len(adapters["layers"]))
    return dataclasses.replace(adapters, weights=adapters.weights | {"layers": _stack(layers, ())})


def _stack(nodes: list[Any], path: tuple[str, ...]) -> Any:
    names = list(dict.fromkeys(name for node in nodes for name in node))
    made = {}
    for name in names:
        own = [node.get(name) for node in nodes]
        if any(isinstance(each, dict) for each in own):
            made[name] = _stack([each or {} for each in own], (*path, name))
            continue
        there = [each for each in own if each is not None]
        if name not in LOW_RANK and len(there) < len(own):
            raise ValueError(
                f"{'.'.join((*path, name))} is trained whole in some layers only, which stacked layers cannot have; "
                "unstack_layers of the params, or train it in all"
            )
        shape = tuple(np.max([each.shape for each in there], axis=0).tolist())
        made[name] = jnp.stack([_filled(each, shape, there[0].dtype) for each in own])
    return made


def _filled(array: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if array is None:
        return jnp.zeros(shape, dtype)
    return jnp.pad(array, [(0, n - own) for n, own in zip(shape, array.shape, strict=True)])


def unstack_adapters(adapters: Adapters) -> Adapters:
    """The same with layers in a list, each array of its own rank."""
    if not adapters.stacked:
        return adapters
    count = jax.tree.leaves(adapters["layers"])[0].shape[0]
    prefix = "decoder.layers" if adapters.head is None else "model.decoder.layers"

    def take(node: dict[str, Any], path: tuple[str, ...], i: int) -> dict[str, Any]:
        made = {}
        for name, value in node.items():
            if isinstance(value, dict):
                inner = take(value, (*path, name), i)
                if inner:
                    made[name] = inner
            elif name not in LOW_RANK:
                made[name] = value[i]
            elif adapters.config.targets(whole := f"{prefix}.{i}.{'.'.join(path)}"):
                r = adapters.config.rank(whole)
                made[name] = value[i, :r] if name == "lora_A" else value[i, :, :r]
        return made

    layers = [take(adapters["layers"], (), i) for i in range(count)]
    return dataclasses.replace(adapters, weights=adapters.weights | {"layers": layers})


def shardings_of(adapters: Adapters, params: Params) -> Any:
    """The sharding of every array of adapters that lie as the params do: a tree like ``adapters``. Reads no leaf."""
    placement = params.placement
    assert placement is not None
    axes = {weight.path: weight.axes for weight in declare(params.config, params.head)}

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        steps = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        *module, name = steps
        stacked = adapters.stacked and steps[0] == "layers"
        return leaf_sharding(placement, axes, ".".join(module), name, leaf.shape, stacked)

    made = jax.tree_util.tree_map_with_path(one, adapters.weights)
    return dataclasses.replace(adapters, weights=made)


def leaf_sharding(
    placement: Placement, axes: dict[str, Any], module: str, name: str, shape: tuple[int, ...], stacked: bool
) -> Any:
    """Of one array: a weight's own, or of a low-rank matrix what splits its long dimension, as far as it divides."""
    lead = (None,) * stacked
    if name not in LOW_RANK:
        return placement.sharding((*lead, *axes[f"{module}.{name}"]))
    of_a, of_b = low_rank_axes(axes[f"{module}.weight"])
    return placement.fitting(shape, (*lead, *(of_a if name == "lora_A" else of_b)))


def place_adapters(adapters: Adapters, params: Params) -> Adapters:
    """The same, laid out as the params are: stacked or not, and over their mesh, by the rules of their weights.

    `with_adapters` does so by itself; training begins with adapters that lie like that. Inside a compiled program they
    are told where to lie.
    """
    adapters = stack_adapters(adapters, params.config) if params.stacked else unstack_adapters(adapters)
    if params.placement is None:
        return adapters
    put = jax.lax.with_sharding_constraint if _traced(adapters) else jax.device_put
    return jax.tree.map(put, adapters, shardings_of(adapters, params))


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
