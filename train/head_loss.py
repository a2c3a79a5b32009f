"""The loss of each head, as a sum that micro-batches add up to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.heads import counts, head_logits, inside, label_losses, last_token, negative_log_likelihood, problem_type_of
from optjax.model import Inputs, finish
from optjax.params import Params

from .batches import SPANS, Batch
from .cross_entropy import summed_loss
from .options import StepOptions

_SINGLE = "single_label_classification"


def loss_counts(params: Params, batch: Batch) -> jax.Array:
    """How many losses the loss of a batch is a mean of: a float32 scalar; of starts and ends of answers ``[2]``."""
    if params.head == "question_answering":
        t = batch["input_ids"].shape[1]
        return jnp.stack([_count(inside(batch[name], t)) for name in SPANS])
    labels = batch["labels"]
    if params.head == "sequence_classification" and problem_type_of(params.config, labels) != _SINGLE:
        return jnp.float32(labels.size)
    return _count(labels)


def loss_scales(params: Params, batch: Batch) -> jax.Array:
    """What `head_loss` of each part of this batch is to be given, so that the sum is the mean over the whole."""
    parts = 2.0 if params.head == "question_answering" else 1.0
    return 1.0 / (parts * jnp.maximum(loss_counts(params, batch), 1.0))


def head_loss(params: Params, x: jax.Array, batch: Batch, scale: jax.Array, options: StepOptions) -> jax.Array:
    """The loss of a micro-batch: a float32 scalar, differentiable in the params and x.

    Args:
      x: ``[B, T, D]``, what the last layer gives.
      scale: of `loss_scales`.

    Raises:
      ValueError: as `summed_loss`.
    """
    x = finish(params, x)
    if params.head == "causal_lm":
        return summed_loss(params, x, batch["labels"], scale, options)
    if params.head == "question_answering":
        logits = head_logits(params, x, "qa_outputs")
        pairs = zip(jnp.moveaxis(logits, -1, 0), (batch[name] for name in SPANS), scale, strict=True)
        return sum(
            (negative_log_likelihood(one, inside(labels, x.shape[1])).sum() * share for one, labels, share in pairs),
            jnp.zeros((), jnp.float32),
        )
    inputs = Inputs(ids=batch["input_ids"], mask=_real(batch))
    last = last_token(inputs, params.config.pad_token_id, x.shape[1])
    logits = head_logits(params, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], "score")
    kind = problem_type_of(params.config, batch["labels"])
    return label_losses(logits, batch["labels"], kind).sum() * scale


def _real(batch: Batch) -> jax.Array | None:
    mask = batch.get("attention_mask", batch.get("segment_ids"))
    return None if mask is None else mask != 0


def _count(labels: jax.Array) -> jax.Array:
    return counts(labels).sum().astype(jnp.float32)
