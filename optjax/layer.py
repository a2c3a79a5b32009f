"""One decoder layer, and the linear map and the norm that everything is made of."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from optjax.attention import attend, by_heads, drop
from optjax.attention_blocks import attend_all_keys_in_blocks, attend_in_blocks
from optjax.cache import write_columns
from optjax.cache_codes import first_columns
from optjax.config import OPTConfig
from optjax.declaration import logical_axes
from optjax.kernels.choice import has_triton
from optjax.kernels.decode import Decode
from optjax.kernels.flash import Flash
from optjax.lora.weight import AdaptedWeight, with_dropout
from optjax.params import wider
from optjax.placed import Resident, cast, constrain, constrain_both, gather, platform
from optjax.quantization.observed import Observed
from optjax.quantization.product import FEW_ROWS, product
from optjax.quantization.weight import QuantizedWeight

LAYER_NORM_EPS = 1e-5
# The name of a weight as it is used, for policies of `jax.checkpoint`: cast and gathered again rather than kept.
USED_WEIGHT = "used_weight"

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def decoder_layer(
    config: OPTConfig,
    placement: Any,
    weights: dict[str, Any],
    x,
    mask,
    head_mask,
    key,
    past,
    own_keys: bool = True,
    query_block: int | None = None,
    flash: Flash | Decode | None = None,
    stay: bool = False,
):
    """One decoder layer, ``[B, T, D]`` to ``[B, T, D]``; also its attention weights and its cache buffers.

    Computes in the dtype of ``x``, whatever that of the weights. With ``own_keys`` the tokens look at their own keys
    only, whatever a cache holds, and ``mask`` is of those. With ``query_block`` attention goes over so many
    queries at a time, with ``flash`` it is a kernel that needs no ``mask``; of both its weights are None. With ``stay``
    the tokens come to the matrices; see `tokens_travel`.
    """
    attention_key, *dropout_keys, skip_key = (None,) * 4 if key is None else jax.random.split(key, 4)
    pre_norm = config.do_layer_norm_before
    # The fifth of `split`, which stays as it is where no adapter needs it.
    weights = with_dropout(weights, None if key is None else jax.random.fold_in(key, 4))
    weights = _as_used(config, placement, weights, x.dtype, stay)

    def residual(x, block, norm, dropout_key):
        y = layer_norm(x, weights.get(norm)) if pre_norm else x
        # The tokens of the residual stream are gathered for a block, and their cotangents scattered after it.
        y = constrain_both(placement, y, ("batch", "length", None), ("batch", "residual_length", None))
        y = constrain(placement, block(y), "batch", "residual_length", None)
        if dropout_key is not None and config.dropout > 0:
            y = drop(y, config.dropout, dropout_key)
        return x + y if pre_norm else layer_norm(x + y, weights.get(norm))

    kept: list[Any] = []

    def attention_block(y):
        own = weights["self_attn"]
        options = past, own_keys, query_block, flash
        out, *rest = _self_attention(config, placement, own, y, mask, head_mask, attention_key, *options)
        kept.extend(rest)
        return out

    def mlp_block(y):
        y = constrain(placement, linear(y, weights["fc1"], placement=placement), "batch", "length", "mlp")
        if platform(placement) == "tpu" and y.shape[0] * y.shape[1] <= FEW_ROWS and y.shape[-1] * x.shape[-1] > 1 << 24:
            # For few rows the TPU compiler would fuse both products into one, which takes longer for large matrices.
            y = jax.lax.optimization_barrier(y)
        return linear(_ACTIVATIONS[config.activation_function](y), weights["fc2"], placement=placement)

    with jax.named_scope("self_attn"):
        y = residual(x, attention_block, "self_attn_layer_norm", dropout_keys[0])
    with jax.named_scope("mlp"):
        y = residual(y, mlp_block, "final_layer_norm", dropout_keys[1])
    if skip_key is not None and config.layerdrop > 0:
        y = jnp.where(jax.random.bernoulli(skip_key, config.layerdrop), x, y)
    attention, buffers = kept
    return y, attention, buffers


def _as_used(config: OPTConfig, placement: Any, weights: dict[str, Any], dtype: Any, stay: bool) -> dict[str, Any]:
    """A layer's weights, the matrices in ``dtype``, gathered; in this order, so that fewer bytes travel.

    With ``stay`` no matrix is, but for those of adapters.
    """
    if placement is None:
        return weights

    def used(weight: Any) -> Any:
        if isinstance(weight, AdaptedWeight | Observed):
            return weight.map(used)
        return weight if isinstance(weight, QuantizedWeight) or weight.ndim < 2 else _name(cast(weight, dtype))

    special = QuantizedWeight | AdaptedWeight | Observed
    weights = jax.tree.map(used, weights, is_leaf=lambda weight: isinstance(weight, special))
    return jax.tree.map(_name, gather(placement, weights, logical_axes(config)["layers"], stay))


def _name(weight: jax.Array) -> jax.Array:
    is_key = jnp.issubdtype(weight.dtype, jax.dtypes.prng_key)
    return weight if is_key else checkpoint_name(weight, USED_WEIGHT)


def _self_attention(
    config: OPTConfig,
    placement: Any,
    weights,
    x,
    mask,
    head_mask,
    dropout_key,
    past,
    own_keys,
    query_block,
    flash: Flash | Decode | None,
):
    b, t, d = x.shape
    heads = (b, t, config.num_attention_heads, config.head_dim)

    # XLA would make one product of all three, with a matrix that it puts together of theirs: for Triton on the way, for
    # cuBLAS in memory, at every step.
    one_by_one = past is not None and platform(placement) == "gpu" and not has_triton(placement)

    def project(name: str) -> jax.Array:
        nonlocal x
        y = constrain(placement, linear(x, weights[name], placement=placement), "batch", "length", "heads")
        if one_by_one:
            y, x = jax.lax.optimization_barrier((y, x))
        return y.reshape(heads)

    # Scaled before the product with k, as the original is: in float16 the other order overflows.
    q = constrain(placement, project("q_proj") * config.head_dim**-0.5, "batch", "length", "heads", None)
    k: Any = project("k_proj")
    v: Any = project("v_proj")
    layout, buffers = "heads", None
    if past is not None:
        k_buffer, v_buffer, index, layout = past
        buffers = write_columns(k_buffer, k, index, layout), write_columns(v_buffer, v, index, layout)
    if own_keys or (isinstance(flash, Flash) and flash.own_keys):
        layout = "heads"
        k, v = (constrain(placement, y.swapaxes(1, 2), "batch", "heads", None, None) for y in (k, v))
    elif buffers is not None:
        k, v = (first_columns(buffer, mask.shape[-1]) for buffer in buffers)
    options: dict[str, Any] = dict(head_mask=head_mask, dropout=config.attention_dropout, dropout_key=dropout_key)
    options["on_cpu"] = platform(placement) == "cpu" and (placement is None or placement.mesh.size == 1)
    options["on_gpu"] = platform(placement) == "gpu"
    if isinstance(flash, Decode):
        out, attention = flash(q, k, v), None
    elif flash is not None:
        attention = None
        if layout == "flat":
            k, v = (by_heads(y, config.num_attention_heads) for y in (k, v))
        out = flash(q, *(y.reshape(b, config.num_attention_heads, -1, config.head_dim) for y in (k, v)))
    elif query_block is None:
        groups = 1 if placement is None else placement.shards("heads")
        out, attention = attend(q, k, v, mask, layout=layout, groups=groups, **options)
    else:
        attention = None
        options |= dict(block=query_block, interleaved=placement is not None and placement.shards("length") > 1)
        if own_keys and t % query_block == 0:
            out = attend_in_blocks(q, k, v, mask, **options)
        else:
            out = attend_all_keys_in_blocks(q, k, v, mask, layout=layout, **options)
    if own_keys and buffers is not None:
        # Nothing else asks for what is written: XLA would put it off, and hold the keys and values of all layers.
        out, buffers = jax.lax.optimization_barrier((out, buffers))
    out = constrain(placement, out, "batch", "length", "heads")
    return linear(out, weights["out_proj"], placement=placement), attention, buffers


def linear(x: jax.Array, weights: dict[str, Any], dtype: Any = None, *, placement: Any) -> jax.Array:
    """``x Wᵀ + b``, with W ``[out, in]``, quantized or not, in ``dtype``: that of x by default."""
    dtype, on = x.dtype if dtype is None else dtype, platform(placement)
    weight, bias = weights["weight"], weights.get("bias")
    if isinstance(weight, Observed):
        weight.see(x)
        return linear(x, {"weight": weight.weight, "bias": bias}, dtype, placement=placement)
    if isinstance(weight, Resident):
        inner = {"weight": weight.weight, "bias": bias}
        y = linear(placement.to_matrix(x, weight.axes), inner, dtype, placement=placement)
        return placement.from_matrix(y, weight.axes)
    weight = weight.astype(x.dtype)
    if isinstance(weight, AdaptedWeight):
        return _adapted(x, weight, bias, dtype, placement)
    if isinstance(weight, QuantizedWeight):
        spread = placement is not None and placement.mesh.size > 1
        y = product(x, weight, on=on, spread=spread, kernels=has_triton(placement))
        return (y if bias is None else y + bias.astype(y.dtype)).astype(dtype)
    if on == "cpu":
        y = _linear_on_cpu(x, weight, bias).astype(dtype)
        # Else XLA would take the transpose of y into a product of bfloat16 that follows, as that of one head of one row
        # with its keys, and fail. On one device attention has barriers of its own.
        return y if placement is None or placement.mesh.size == 1 else jax.lax.optimization_barrier(y)
    *lead, n_in = x.shape
    alone = math.prod(lead) == 1
    if alone and on == "gpu" and dtype != x.dtype:
        # cuBLAS multiplies no vector into a wider type: XLA would write a copy of W in that type first.
        y = (weight.astype(dtype) * x.reshape(n_in).astype(dtype)).sum(-1).reshape(*lead, -1)
        return y if bias is None else y + bias.astype(dtype)
    padded = alone and on == "tpu"
    if padded:
        # A product with a vector would be multiplied and summed off the matrix unit, which takes three times as long.
        x = jnp.pad(x.reshape(1, -1), ((0, 7), (0, 0)))
    y = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    y = y[:1].reshape(*lead, -1) if padded else y
    return y if bias is None else y + bias.astype(dtype)


def _adapted(x: jax.Array, weight: AdaptedWeight, bias: jax.Array | None, dtype: Any, placement: Any) -> jax.Array:
    """``W x + b + scale · B (A x)``, what goes into A with dropout if it has a key."""
    y = linear(x, {"weight": weight.base, "bias": bias}, dtype, placement=placement)
    dropped = x if weight.key is None else drop(x, weight.dropout, weight.key)
    inner = linear(dropped, {"weight": weight.lora_A}, jnp.float32, placement=placement)
    # Where W's inputs are split over devices these are sums of parts, and as small as the rank.
    inner = constrain(placement, inner, "batch", *("length",) * (x.ndim - 2), None)
    inner = (inner * weight.scale).astype(x.dtype)
    return y + linear(inner, {"weight": weight.lora_B}, dtype, placement=placement)


def _linear_on_cpu(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`linear` as XLA's CPU backend does it best: bench/small_products.py has the figures.

    The result is float32. Asked for bfloat16, XLA would multiply by way of a float32 copy of W.
    """
    dtype = wider(x.dtype, jnp.float32)
    bias = None if bias is None else bias.astype(dtype)
    rows = math.prod(x.shape[:-1])
    if rows > FEW_ROWS:
        y = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
        return y if bias is None else y + bias
    flat = x.reshape(rows, -1)
    if rows == 1 and x.dtype == jnp.bfloat16:
        flat = jnp.concatenate([flat, flat])  # a product with a vector would copy W again
    # As (W xᵀ + b)ᵀ: W is read up to 40% faster as the left operand.
    # Where no bias stands between the product and its transpose, XLA would make x Wᵀ of them again.
    y = jax.lax.optimization_barrier(jnp.einsum("oi,ri->or", weight, flat, preferred_element_type=dtype))[:, :rows]
    y = y if bias is None else y + bias[:, None]
    return y.T.reshape(*x.shape[:-1], -1)


def layer_norm(x: jax.Array, weights: dict[str, jax.Array] | None) -> jax.Array:
    """Layer norm over the last axis, in float32; ``weights`` None where ``layer_norm_elementwise_affine`` is off."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    if weights:
        y = y * weights["weight"].astype(jnp.float32) + weights["bias"].astype(jnp.float32)
    return y.astype(x.dtype)
