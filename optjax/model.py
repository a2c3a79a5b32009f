"""The decoder as a pure function: one path for training, prefill in chunks and one-token decoding.

Zhang et al. 2022 (OPT: Open Pre-trained Transformer Language Models), in the form of transformers' modeling_opt.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.attention import causal_mask
from optjax.attention_blocks import block_of_queries
from optjax.cache import Cache, write_mask
from optjax.declaration import logical_axes
from optjax.kernels.choice import cache_for_few, rounded_cache, settle, spread_by_hand
from optjax.kernels.decode import Decode
from optjax.kernels.flash import Flash
from optjax.layer import decoder_layer, layer_norm, linear
from optjax.lora.weight import with_dropout
from optjax.offloading import bring
from optjax.params import Params, as_key
from optjax.placed import constrain, gather, tokens_travel
from optjax.quantization.weight import QuantizedWeight
from optjax.validate import as_array, as_head_mask, as_ids, as_int32, as_mask, check_params, check_positions

# Hugging Face's position table has two rows before that of position 0 (#20761). Masked slots are at position -1.
POSITION_OFFSET = 2

_log = logging.getLogger(__name__)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["last_hidden_state", "hidden_states", "attentions", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What `forward` returns.

    Attributes:
      last_hidden_state: ``[B, T, E]``, after the final norm and project_out.
      hidden_states: L + 1 arrays, if asked for: the input of each layer ``[B, T, D]``, then ``last_hidden_state``.
      attentions: L arrays ``[B, H, T, S]`` in float32, if asked for: the weights after softmax and head_mask.
      cache: the cache with this call's tokens, where one was given.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cache: Cache | None = None


def forward(
    params: Params,
    ids: Any = None,
    *,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Cache | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    dropout_key: jax.Array | None = None,
    attn_implementation: str = "auto",
) -> ModelOutput:
    """The decoder: ids in, hidden states out.

    Args:
      params: from `init_params` or `load_params`, with any head.
      ids: ``[B, T]`` int, 0 to vocab_size - 1.
      attention_mask: ``[B, T]`` bool or int, of this call's ids; padding may stand anywhere. All ones by default, also
        where ids contain the pad id (as in transformers).
      position_ids: ``[B, T]``; by default counted from the mask, so that padding takes no positions.
      head_mask: ``[H]`` or ``[L, H]``; multiplies each head's weights after the softmax.
      inputs_embeds: ``[B, T, E]`` in place of ids: rows of the word embedding, or anything of their kind.
      cache: from `init_cache` or an earlier call; this call's tokens follow those it holds.
      output_hidden_states, output_attentions: keep them.
      dropout_key: turns dropout, attention_dropout and layerdrop on.
      attn_implementation: ``"eager"``, ``"flash"`` (kernels of TPU and GPU, which give no attentions and take neither
        head_mask nor attention dropout), or ``"auto"``; `attention_kind` says which one that is.

    Returns:
      A `ModelOutput`.

    Raises:
      ValueError: shapes, dtypes or ids that do not fit, a row longer than max_position_embeddings, a full cache;
        ``attn_implementation="flash"`` where it cannot be had.
    """
    inputs = check_inputs(params, ids, attention_mask, position_ids, head_mask, inputs_embeds, cache, dropout_key)
    inputs = with_attention(params, inputs, attn_implementation, bool(output_attentions))
    return _forward(params, inputs, bool(output_hidden_states), bool(output_attentions))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "embeds", "mask", "position_ids", "head_mask", "cache", "dropout_key", "visible"],
    meta_fields=["attn_implementation", "no_past"],
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The checked arguments of `forward`; None where absent. Not checked again inside compiled code.

    ``no_past`` says of a cache that it is empty: its index is 0.

    With a cache ``visible`` ``[B, T, S]`` may say instead of ``mask`` which columns each token attends to, its own
    among them: several continuations of a row may be read side by side. It comes with position_ids.
    """

    ids: Any = None
    embeds: Any = None
    mask: Any = None
    position_ids: Any = None
    head_mask: Any = None
    cache: Cache | None = None
    dropout_key: Any = None
    visible: Any = None
    attn_implementation: str = "eager"
    no_past: bool = False


def check_inputs(
    params: Params, ids, attention_mask, position_ids, head_mask, inputs_embeds, cache, dropout_key
) -> Inputs:
    """The arguments of `forward` as `Inputs`, or a ValueError."""
    config = check_params(params).config
    if (ids is None) == (inputs_embeds is None):
        raise ValueError("give either ids or inputs_embeds, " + ("not both" if ids is not None else "one of them"))
    if ids is not None:
        ids = as_ids(ids, config.vocab_size)
        b, t = ids.shape
    else:
        inputs_embeds = as_array(inputs_embeds, "inputs_embeds")
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.embed_dim or 0 in inputs_embeds.shape:
            raise ValueError(f"inputs_embeds should have shape [B, T, {config.embed_dim}], got {inputs_embeds.shape}")
        if not jnp.issubdtype(inputs_embeds.dtype, jnp.floating):
            raise ValueError(f"inputs_embeds should be floating point, got {inputs_embeds.dtype}")
        b, t = inputs_embeds.shape[:2]
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"cache should come from init_cache, got {type(cache).__name__}")
    mask = None if attention_mask is None else as_mask(attention_mask, (b, t))
    position_ids = None if position_ids is None else as_array(position_ids, "position_ids")
    check_positions(config, mask, position_ids, cache, (b, t))
    return Inputs(
        ids=ids,
        embeds=inputs_embeds,
        mask=mask,
        position_ids=None if position_ids is None else as_int32(position_ids),
        head_mask=None if head_mask is None else as_head_mask(head_mask, config),
        cache=cache,
        dropout_key=None if dropout_key is None else as_key(dropout_key),
    )


def with_attention(params: Params, inputs: Inputs, name: str, output_attentions: bool) -> Inputs:
    """Inputs with ``attn_implementation``; or the ValueError of `settle`."""
    inputs = dataclasses.replace(inputs, attn_implementation=name)
    attention_of(params, inputs, output_attentions)
    if name == "auto" and spread_by_hand(params):
        return dataclasses.replace(inputs, attn_implementation="eager")
    return inputs


def attention_of(params: Params, inputs: Inputs, output_attentions: bool) -> str:
    """The kind of attention of a pass, as `settle` says."""
    tokens, cache = inputs.ids if inputs.ids is not None else inputs.embeds, inputs.cache
    for_few = odd = not_for_many = None
    if cache is not None and not inputs.no_past:
        for_few = cache_for_few(params.placement, cache, tokens.shape[1])
    if output_attentions:
        odd = "it gives no attention weights, and output_attentions asks for them"
    elif inputs.head_mask is not None:
        odd = "it takes no head_mask"
    elif inputs.dropout_key is not None and params.config.attention_dropout > 0:
        odd = f"it has no dropout, and attention_dropout is {params.config.attention_dropout}"
    elif inputs.visible is not None:
        not_for_many = "each token attends to columns of its own"
    elif cache is not None:
        not_for_many = rounded_cache(cache.dtype)
    return settle(
        inputs.attn_implementation,
        params.config,
        params.placement,
        params.dtype,
        tokens.shape[:2],
        has_past=cache is not None and not inputs.no_past,
        one_column=cache is None or jnp.ndim(cache.index) == 0,
        for_few=for_few,
        odd=odd,
        not_for_many=not_for_many,
    )


@partial(jax.jit, static_argnums=(2, 3))
def _forward(params: Params, inputs: Inputs, output_hidden_states: bool, output_attentions: bool) -> ModelOutput:
    return decoder(params, inputs, output_hidden_states, output_attentions)


def decoder(
    params: Params, inputs: Inputs, output_hidden_states: bool = False, output_attentions: bool = False
) -> ModelOutput:
    """`forward` without checks and without a jit of its own, for use inside compiled programs."""
    config, placement, cache = params.config, params.placement, inputs.cache
    params = with_outer_dropout(params, inputs.dropout_key)
    # With a cache there is hardly ever a backward pass, and there are often few tokens.
    tokens = (inputs.ids if inputs.embeds is None else inputs.embeds).shape[:2]
    stay = cache is not None and tokens_travel(placement, tokens, config.hidden_size)
    with jax.named_scope("embed"):
        x = embed(params, inputs, stay=stay)
    b, t = x.shape[:2]
    new_mask = jnp.ones((b, t), bool) if inputs.mask is None else jnp.asarray(inputs.mask)
    columns = jnp.arange(t, dtype=jnp.int32)
    # Nothing else is in an empty cache, whose other columns need no look; but their own in there, if it rounds them.
    own_keys = cache is None or (inputs.no_past and cache.dtype == x.dtype)
    own_columns = inputs.no_past and (placement is None or placement.shards("cache_length") == 1)
    mask = causal_mask(new_mask, columns)
    if cache is not None:
        all_masks = write_mask(cache.mask, new_mask, cache.index)
        if inputs.visible is not None:
            mask = inputs.visible[:, None]
        elif not own_keys and not own_columns:
            mask = causal_mask(all_masks, cache.index[..., None] + columns)
    keep_hidden, keep_attention = output_hidden_states, output_attentions
    block = flash = None
    kind = attention_of(params, inputs, keep_attention)
    # Once for each program, while it is traced.
    _log.info("attention of %d tokens in each of %d rows: %s", t, b, "eager" if kind == "eager" else "flash")
    if kind == "decode":
        flash = Decode(placement, mask[:, 0])
    elif kind == "flash":
        if cache is None or inputs.no_past:
            flash = Flash(placement, None if inputs.mask is None else new_mask)
        else:
            flash = Flash(placement, None, all_masks, cache.index)
    elif not keep_attention:
        block = block_of_queries(placement, b, t, mask.shape[-1], config.num_attention_heads)

    def layer(x, weights, i, head_mask, buffers):
        key = None if inputs.dropout_key is None else jax.random.fold_in(inputs.dropout_key, i)
        past = None if cache is None else (*buffers, cache.index, cache.layout)
        kind: Any = {"own_keys": own_keys, "query_block": block, "flash": flash, "stay": stay}
        y, attention, buffers = decoder_layer(config, placement, weights, x, mask, head_mask, key, past, **kind)
        return y, (x if keep_hidden else None, attention if keep_attention else None, buffers)

    hidden: Any
    attentions: Any
    buffers: Any = None
    if params.stacked and cache is None and params.offload is None:
        layers = jnp.arange(config.num_hidden_layers)

        def step(x, each):
            weights, i, head_mask = each
            return layer(x, weights, i, head_mask, None)

        x, (hidden, attentions, _) = jax.lax.scan(step, x, (params["layers"], layers, inputs.head_mask))
        hidden, attentions = (None if a is None else tuple(a) for a in (hidden, attentions))
    else:
        # With a cache the layers are unrolled: a scan would carry a second copy of the cache.
        kept, coming = [], None
        for i in range(config.num_hidden_layers):
            head_mask = None if inputs.head_mask is None else inputs.head_mask[i]
            past = None if cache is None else (cache.keys[i], cache.values[i])
            weights, coming = bring(params, i, x, coming)
            x, out = layer(x, weights, i, head_mask, past)
            kept.append(out)
        hidden, attentions, buffers = zip(*kept, strict=True)

    with jax.named_scope("final"):
        x = finish(params, x, stay)
    if cache is not None:
        keys, values = zip(*buffers, strict=True)
        lengths = cache.lengths + new_mask.sum(1, dtype=jnp.int32)
        cache = dataclasses.replace(
            cache, keys=keys, values=values, mask=all_masks, lengths=lengths, index=cache.index + t
        )
    return ModelOutput(
        last_hidden_state=x,
        hidden_states=(*hidden, x) if keep_hidden else None,
        attentions=attentions if keep_attention else None,
        cache=cache,
    )


def with_outer_dropout(params: Params, key: jax.Array | None) -> Params:
    """Params whose adapters outside the layers drop some of their inputs; see `with_dropout`."""
    if key is None:
        return params
    layers, outside = params["layers"], {name: each for name, each in params.weights.items() if name != "layers"}
    # No layer has this number.
    outside = with_dropout(outside, jax.random.fold_in(key, params.config.num_hidden_layers))
    return dataclasses.replace(params, weights=outside | {"layers": layers})


def embed(params: Params, inputs: Inputs, dtype: Any = None, stay: bool = False) -> jax.Array:
    """Word embedding (projected in) plus position embedding: ``[B, T, D]``, in the params' dtype by default."""
    dtype = params.dtype if dtype is None else dtype
    axes = ("batch", "residual_length", None)
    if inputs.embeds is None:
        x = _rows(params, "embed_tokens", dtype, inputs.ids, stay)
    else:
        x = jnp.asarray(inputs.embeds).astype(dtype)
    x = constrain(params.placement, x, *axes)
    b, t = x.shape[:2]
    if params.config.has_projections:
        x = linear(x, {"weight": _weight(params, "project_in", dtype, stay)}, placement=params.placement)
    if inputs.position_ids is not None:
        positions = inputs.position_ids
    else:
        start = jnp.zeros((b,), jnp.int32) if inputs.cache is None else inputs.cache.lengths
        positions = mask_positions(inputs.mask, start, t)
    x = x + _rows(params, "embed_positions", dtype, positions + POSITION_OFFSET, stay).astype(x.dtype)
    return constrain(params.placement, x, *axes)


def finish(params: Params, x: jax.Array, stay: bool = False) -> jax.Array:
    """The last hidden state ``[B, T, E]``, from what the last layer gives."""
    if params.config.has_final_layer_norm:
        norm = params.weights.get("final_layer_norm")
        axes = logical_axes(params.config, params.head).get("final_layer_norm")
        x = layer_norm(x, gather(params.placement, norm, axes))
    if params.config.has_projections:
        x = linear(x, {"weight": _weight(params, "project_out", x.dtype, stay)}, placement=params.placement)
        # Where it came out of a matrix in parts, before single tokens are taken from it.
        x = constrain(params.placement, x, "batch", "length", None) if stay else x
    return x


def _rows(params: Params, name: str, dtype: Any, index: jax.Array, stay: bool) -> jax.Array:
    """Rows of a table outside the layers."""
    table, placement = params[name]["weight"], params.placement
    axes = logical_axes(params.config, params.head)[name]["weight"]
    if isinstance(table, QuantizedWeight):
        if placement is not None and stay:
            return placement.take_coded(table, axes, index, dtype)
        return constrain(placement, gather(placement, table, axes).rows(index, dtype), "batch", "length", None)
    if placement is None:
        return table[index]
    return placement.take(table, axes, index, dtype, stay)


def _weight(params: Params, name: str, dtype: Any, stay: bool = False) -> Any:
    """A matrix outside the layers, as it is used."""
    weight = params[name]["weight"]
    if params.placement is None:
        return weight
    axes = logical_axes(params.config, params.head)[name]["weight"]
    return gather(params.placement, weight.astype(dtype), axes, stay)


def mask_positions(mask: Any | None, start: jax.Array, t: int) -> jax.Array:
    """Positions ``[B, T]`` of tokens that follow ``start`` ``[B]`` earlier ones; -1 where masked."""
    if mask is None:
        return start[:, None] + jnp.arange(t, dtype=jnp.int32)
    mask = jnp.asarray(mask)
    counted = start[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    return jnp.where(mask, counted, 0) - 1
