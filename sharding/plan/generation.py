"""The programs of generation: reading prompts, and one step of decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optjax.cache import Cache, cache_axes, default_layout, init_cache, map_columns, scale_axes
from optjax.checkpoints.layer_files import abstract_layer_files
from optjax.config import OPTConfig
from optjax.generation.decode import _decode_step, _prefill
from optjax.kernels.choice import attention_kind
from optjax.offloading import offload as offloaded
from optjax.params import abstract_params
from optjax.sharding.placement import Placement

from .program import Program


def generation_programs(
    config: OPTConfig,
    placement: Placement,
    *,
    batch: int,
    prompt: int,
    cache_length: int,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    offload: str | None = None,
    disk_bandwidth: float | None = None,
) -> list[Program]:
    """Prefill of ``prompt`` tokens and a decode step, of ``batch`` rows with caches of ``cache_length`` columns.

    ``offload`` is as of `optjax.load_params`; how fast a disk is changes no program.
    """
    params = abstract_params(config, jnp.dtype(dtype), mesh=placement.mesh, rules=dict(placement.rules))
    if offload == "host":
        params = offloaded(params)
    elif offload == "disk":
        params = abstract_layer_files(params)
    cache = abstract_cache(config, placement, batch, cache_length, cache_dtype or dtype)
    groups = {"weights": params, "cache": (cache.keys, cache.values)}

    def ids(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        sharding = placement.fitting(shape, ("batch", None)[: len(shape)])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prompts = (ids(batch, prompt), ids(batch, prompt, dtype=jnp.bool_))
    kind = attention_kind(params, batch, prompt, cache_dtype=cache_dtype)
    return [
        Program("prefill", _prefill, (params, *prompts, cache, None, kind, True), groups),
        Program("decode step", _decode_step, (params, ids(batch), cache), groups),
    ]


def abstract_cache(config: OPTConfig, placement: Placement, batch: int, length: int, dtype: str) -> Cache:
    """What `init_cache` makes for params of that placement, as abstract arrays."""
    layout = default_layout(placement.platform)
    empty = jax.eval_shape(lambda: init_cache(config, batch, length, dtype, layout=layout))
    axes = cache_axes(layout, batch)

    def place(leaf: Any, axes: tuple[str | None, ...]) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.fitting(leaf.shape, axes))

    def place_columns(leaf: Any, axis: int) -> Any:
        return place(leaf, axes if axis == -2 else scale_axes(leaf.shape))

    return dataclasses.replace(
        map_columns(place_columns, empty),
        mask=place(empty.mask, ("batch", None)),
        lengths=place(empty.lengths, ("batch",)),
        index=place(empty.index, ()),
    )
