"""What stands on the decoder: language modelling, sequence classification, question answering, and their losses."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.cache import Cache
from optjax.config import PROBLEM_TYPES, OPTConfig
from optjax.declaration import logical_axes
from optjax.layer import linear
from optjax.model import Inputs, ModelOutput, check_inputs, decoder, with_attention, with_outer_dropout
from optjax.params import Params
from optjax.placed import constrain, gather
from optjax.validate import as_array, check_params, check_range

IGNORE_INDEX = -100


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "loss", "hidden_states", "attentions", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class HeadOutput:
    """Logits in float32, the loss (a float32 scalar) where labels were given, and the rest as of `ModelOutput`."""

    logits: jax.Array
    loss: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cache: Cache | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["start_logits", "end_logits", "loss", "hidden_states", "attentions", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class QuestionAnsweringOutput:
    """Logits ``[B, T]`` in float32 of an answer's first and last token, and the rest as of `HeadOutput`."""

    start_logits: jax.Array
    end_logits: jax.Array
    loss: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cache: Cache | None = None


def causal_lm(
    params: Params,
    ids: Any = None,
    *,
    labels: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Cache | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    dropout_key: jax.Array | None = None,
    attn_implementation: str = "auto",
) -> HeadOutput:
    """Next-token logits ``[B, T, V]``, and the loss where labels are given.

    ``labels`` ``[B, T]`` are the ids themselves, shifted here; -100 is ignored. The loss is the mean over what is not
    ignored, and 0 where all is. The other arguments are those of `forward`.

    Raises:
      ValueError: as `forward`; labels of another shape or outside the vocabulary; params with another head.
    """
    check_params(params, ("causal_lm",))
    inputs = check_inputs(params, ids, attention_mask, position_ids, head_mask, inputs_embeds, cache, dropout_key)
    inputs = with_attention(params, inputs, attn_implementation, bool(output_attentions))
    if labels is not None:
        labels = _as_labels(labels, _shape(inputs), params.config.vocab_size)
    return _causal_lm(params, inputs, labels, bool(output_hidden_states), bool(output_attentions))


@partial(jax.jit, static_argnums=(3, 4))
def _causal_lm(params: Params, inputs: Inputs, labels, output_hidden_states, output_attentions) -> HeadOutput:
    out = decoder(params, inputs, output_hidden_states, output_attentions)
    logits = lm_logits(with_outer_dropout(params, inputs.dropout_key), out.last_hidden_state)
    loss = None if labels is None else cross_entropy(logits[:, :-1], labels[:, 1:])
    return HeadOutput(logits, loss, *_rest(out))


def lm_logits(params: Params, x: jax.Array) -> jax.Array:
    """Logits ``[…, V]`` in float32 from hidden states ``[…, E]``, by the tied embedding or the untied head."""
    name = "embed_tokens" if params.config.tie_word_embeddings else "lm_head"
    placement, weight = params.placement, params[name]["weight"]
    length = ("length",) * (x.ndim - 2)
    with jax.named_scope("lm_head"):
        if placement is not None:
            axes = logical_axes(params.config, params.head)[name]["weight"]
            stay = placement.tokens_travel_to_head(x.shape[:-1], *weight.shape)
            weight = gather(placement, weight.astype(x.dtype), axes, stay)
        x = constrain(placement, x, "batch", *length, None)
        logits = linear(x, {"weight": weight}, jnp.float32, placement=placement)
        return constrain(placement, logits, "batch", *length, "vocab")


def head_logits(params: Params, x: jax.Array, name: str) -> jax.Array:
    """A classifier's logits in float32, by the weights of that name: ``score`` or ``qa_outputs``."""
    weights = gather(params.placement, params[name], logical_axes(params.config, params.head)[name])
    return linear(x, weights, placement=params.placement).astype(jnp.float32)


def sequence_classification(
    params: Params,
    ids: Any = None,
    *,
    labels: Any = None,
    problem_type: str | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Cache | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    dropout_key: jax.Array | None = None,
    attn_implementation: str = "auto",
) -> HeadOutput:
    """Logits ``[B, num_labels]`` read at each row's last real token, and the loss where labels are given.

    The last real token is the last whose mask is 1; without a mask, the last id that is not the pad id.

    Args:
      labels: int ``[B]`` for ``single_label_classification`` (-100 is ignored); float ``[B, num_labels]`` of 0 and 1
        for ``multi_label_classification``; float ``[B]`` or ``[B, num_labels]`` for ``regression``.
      problem_type: one of those three; by default the config's, else inferred as transformers does: one label is
        regression, integer labels are single-label, others multi-label.

    Raises:
      ValueError: as `forward`; labels or problem_type that do not fit; params with another head.
    """
    check_params(params, ("sequence_classification",))
    inputs = check_inputs(params, ids, attention_mask, position_ids, head_mask, inputs_embeds, cache, dropout_key)
    inputs = with_attention(params, inputs, attn_implementation, bool(output_attentions))
    kind = problem_type or params.config.problem_type
    if kind is not None and kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type {kind!r} is not one of {', '.join(PROBLEM_TYPES)}")
    if labels is not None:
        labels = as_array(labels, "labels")
        kind = problem_type_of(params.config, labels, _shape(inputs)[0], problem_type)
        if kind == "single_label_classification":
            check_range(labels, 0, params.config.num_labels, "labels", "num_labels", allowed=IGNORE_INDEX)
    out_flags = bool(output_hidden_states), bool(output_attentions)
    return _sequence_classification(params, inputs, labels, kind, *out_flags)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _sequence_classification(params, inputs: Inputs, labels, kind, output_hidden_states, output_attentions):
    out = decoder(params, inputs, output_hidden_states, output_attentions)
    last = last_token(inputs, params.config.pad_token_id, out.last_hidden_state.shape[1])
    pooled = jnp.take_along_axis(out.last_hidden_state, last[:, None, None], axis=1)[:, 0]
    logits = head_logits(with_outer_dropout(params, inputs.dropout_key), pooled, "score")
    loss = None
    if labels is not None:
        if kind == "single_label_classification":
            loss = cross_entropy(logits, labels)
        else:
            loss = jnp.mean(label_losses(logits, labels, kind))
    return HeadOutput(logits, loss, *_rest(out))


def problem_type_of(config: OPTConfig, labels: Any, rows: int | None = None, problem_type: str | None = None) -> str:
    """The problem_type of labels: what is asked for, else the config's, else inferred as transformers does.

    Raises:
      ValueError: labels of ``rows`` rows that have another shape or dtype.
    """
    kind, n = problem_type or config.problem_type, config.num_labels
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if kind is None:
        kind = "regression" if n == 1 else f"{'single' if integers else 'multi'}_label_classification"
    if rows is not None:
        shapes = {"single_label_classification": [(rows,)], "multi_label_classification": [(rows, n)]}
        wanted = shapes.get(kind, [(rows, n)] + ([(rows,)] if n == 1 else []))
        if labels.shape not in wanted:
            raise ValueError(f"labels for {kind} should have shape {wanted[0]}, got {labels.shape}")
        if kind == "single_label_classification" and not integers:
            raise ValueError(f"labels for {kind} should be integers, got {labels.dtype}")
    return kind


def label_losses(logits: jax.Array, labels: jax.Array, kind: str) -> jax.Array:
    """Losses in float32 of logits ``[B, num_labels]``, by problem_type: ``[B]`` of a single label, else one a logit."""
    if kind == "single_label_classification":
        return negative_log_likelihood(logits, labels)
    y = labels.reshape(logits.shape).astype(jnp.float32)
    if kind == "multi_label_classification":
        # -log sigmoid(x) for a 1, -log sigmoid(-x) for a 0, in the form that does not overflow.
        return jax.nn.softplus(logits) - logits * y
    return jnp.square(logits - y)


def last_token(inputs: Inputs, pad_token_id: int | None, t: int) -> jax.Array:
    """Column ``[B]`` of each row's last real token; the last column of a row that has none."""
    if inputs.mask is not None:
        real = jnp.asarray(inputs.mask)
    elif inputs.ids is not None and pad_token_id is not None:
        real = jnp.asarray(inputs.ids) != pad_token_id
    else:
        return jnp.full((_shape(inputs)[0],), t - 1)
    last = jnp.max(jnp.where(real, jnp.arange(t), -1), axis=1)
    return jnp.where(last < 0, t - 1, last)


def question_answering(
    params: Params,
    ids: Any = None,
    *,
    start_positions: Any = None,
    end_positions: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Cache | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    dropout_key: jax.Array | None = None,
    attn_implementation: str = "auto",
) -> QuestionAnsweringOutput:
    """Logits ``[B, T]`` of where an answer starts and ends, and the loss where both positions ``[B]`` are given.

    A position outside the sequence is ignored by the loss. The other arguments are those of `forward`.

    Raises:
      ValueError: as `forward`; one of the positions without the other, or of the wrong shape; params with another head.
    """
    check_params(params, ("question_answering",))
    inputs = check_inputs(params, ids, attention_mask, position_ids, head_mask, inputs_embeds, cache, dropout_key)
    inputs = with_attention(params, inputs, attn_implementation, bool(output_attentions))
    if (start_positions is None) != (end_positions is None):
        raise ValueError("give both start_positions and end_positions, or neither")
    spans = None
    if start_positions is not None:
        spans = as_array(start_positions, "start_positions"), as_array(end_positions, "end_positions")
        for name, array in zip(("start_positions", "end_positions"), spans, strict=True):
            if array.shape != _shape(inputs)[:1] or not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(
                    f"{name} should be integers of shape {_shape(inputs)[:1]}, got {array.dtype} {array.shape}"
                )
    return _question_answering(params, inputs, spans, bool(output_hidden_states), bool(output_attentions))


@partial(jax.jit, static_argnums=(3, 4))
def _question_answering(params, inputs: Inputs, spans, output_hidden_states, output_attentions):
    out = decoder(params, inputs, output_hidden_states, output_attentions)
    logits = head_logits(with_outer_dropout(params, inputs.dropout_key), out.last_hidden_state, "qa_outputs")
    start, end = logits[..., 0], logits[..., 1]
    loss = None
    if spans is not None:
        t = start.shape[1]
        loss = (cross_entropy(start, inside(spans[0], t)) + cross_entropy(end, inside(spans[1], t))) / 2
    return QuestionAnsweringOutput(start, end, loss, *_rest(out))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in float32 of labels ``[…]`` under logits ``[…, V]``; labels of -100 are left out.

    Where all are left out the loss and its gradient are 0 (transformers gives NaN).
    """
    return negative_log_likelihood(logits, labels).sum() / jnp.maximum(counts(labels).sum(), 1).astype(jnp.float32)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """In float32, of labels ``[…]`` under logits ``[…, V]``; 0 where a label is -100."""
    labels, kept = jnp.asarray(labels), counts(labels)
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.where(kept, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(kept, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)


def counts(labels: Any) -> jax.Array:
    """Which labels ``[…]`` a loss looks at: those that are not -100."""
    return jnp.asarray(labels).astype(jnp.int32) != IGNORE_INDEX  # of 8 bits without a sign -100 is 156


def inside(positions: Any, t: int) -> jax.Array:
    """Positions ``[B]`` in int32; -100, which losses leave out, in place of those outside T tokens."""
    positions = jnp.asarray(positions).astype(jnp.int32)  # T may be more than 8 bits hold
    return jnp.where((positions >= 0) & (positions < t), positions, IGNORE_INDEX)


def _as_labels(labels: Any, shape: tuple[int, int], vocab_size: int):
    labels = as_array(labels, "labels")
    if labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels should be integers of shape {shape}, got {labels.dtype} {labels.shape}")
    check_range(labels, 0, vocab_size, "labels", "the vocabulary", allowed=IGNORE_INDEX)
    return labels


def _shape(inputs: Inputs) -> tuple[int, int]:
    return (inputs.ids if inputs.ids is not None else inputs.embeds).shape[:2]


def _rest(out: ModelOutput):
    return out.hidden_states, out.attentions, out.cache
