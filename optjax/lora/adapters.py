"""Fresh adapters for a model."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.lora.config import LoraConfig
from optjax.lora.layout import place_adapters
from optjax.lora.parts import LOW_RANK, Adapters, Part, as_config, build, declare_parts
from optjax.lora.weight import check_not_adapted
from optjax.params import Params, as_key, floating_dtype
from optjax.quantization.weight import QuantizedWeight


def init_adapters(params: Params, config: LoraConfig, key: jax.Array, dtype: Any = jnp.float32) -> Adapters:
    """Fresh adapters for a model, which change nothing yet (but with ``init_lora_weights=False``).

    Every array is drawn by the name of its module, so that the same key gives the same adapters, stacked or not, on
    one device or many. They are stacked if the params are, and lie over a mesh by the same rules.

    Args:
      params: the frozen model, quantized or not; abstract ones too, where nothing is trained whole.
      key: a jax PRNG key.
      dtype: of the adapters. Small updates vanish in less than float32.

    Raises:
      ValueError: a config that does not fit the model, a key or a dtype that is none, or params with adapters.
    """
    if not isinstance(params, Params):
        raise ValueError(f"params should be what init_params or load_params return, not {type(params).__name__}")
    check_not_adapted(params, "get no second ones")
    config, key, dtype = as_config(config, params.head), as_key(key), floating_dtype(dtype)
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights should be True, False or 'gaussian', not {config.init_lora_weights!r}")

    def leaf(part: Part) -> jax.Array:
        if part.name not in LOW_RANK:
            return _copy(params, part, dtype)
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(".".join(map(str, part.keys)).encode())))
        return _draw(own, part, config.init_lora_weights, dtype)

    made = Adapters(build(declare_parts(params.config, params.head, config), leaf), config, params.head)
    return place_adapters(made, params)


def _draw(key: jax.Array, part: Part, how: Any, dtype: Any) -> jax.Array:
    """As torch and PEFT draw: lora_A as a linear layer's weights, uniform in ±1/√in; or normal, of deviation 1/r."""
    if part.name == "lora_B" and how is not False:
        return jnp.zeros(part.shape, dtype)
    if how == "gaussian":
        return (jax.random.normal(key, part.shape) / part.rank).astype(dtype)
    bound = part.shape[-1] ** -0.5
    return jax.random.uniform(key, part.shape, minval=-bound, maxval=bound).astype(dtype)


def _copy(params: Params, part: Part, dtype: Any) -> jax.Array:
    """The model's own weight, to be trained."""
    node: Any = params.weights
    for step in part.weight.keys(part.layer):
        node = node if params.stacked and isinstance(step, int) else node[step]
    if isinstance(node, QuantizedWeight):
        node = node.dequantize(dtype)
    taken = node[part.layer] if params.stacked and part.layer is not None else node
    # A copy, as the adapters' buffers are given up to the next step's.
    return jnp.array(taken, dtype, copy=True)
