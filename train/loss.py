"""What training minimizes, and the same number on batches that are not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import jax
import numpy as np

from optjax.heads import causal_lm, cross_entropy
from optjax.offloading import check_not_offloaded
from optjax.params import Params

from .backward import batch_loss
from .batches import Batch, check_arrays
from .head_loss import loss_counts, loss_scales
from .options import PLAIN, StepOptions
from .placing import place_batch


def next_token_loss(params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy in nats per token of ``labels [B, T]``, which follow ``input_ids [B, T]``: the model as it is,
    for any params of a language model."""
    return cross_entropy(causal_lm(params, batch["input_ids"], dropout_key=dropout_key).logits, batch["labels"])


@partial(jax.jit, static_argnums=2)
def _evaluate(params: Params, batch: Batch, options: StepOptions) -> tuple[jax.Array, jax.Array]:
    check_arrays(params, batch)
    loss = batch_loss(params, batch, loss_scales(params, batch), None, options)
    return loss, loss_counts(params, batch).sum()


def evaluate(
    params: Params,
    batches: Iterable[Batch],
    options: StepOptions = PLAIN,
    *,
    batch_size: int | None = None,
    bytes_per_token: float | None = None,
) -> dict[str, float]:
    """The loss on batches, without dropout.

    Args:
      params: quantized or not, with adapters or without.
      batches: this process's `rows` of each.
      batch_size: rows of a batch of all processes; by default those of this one.
      bytes_per_token: of the text that was tokenized.

    Returns:
      ``loss``: the mean over all that the loss is a mean of; of a language model ``perplexity``, its exponential, and
      with ``bytes_per_token`` ``bits_per_byte``, which compares across tokenizers. Each row is predicted from its own
      beginning on, so they are a little higher than with a sliding window.

    Raises:
      ValueError: the layers are offloaded (`next_token_loss` takes those too); there are no batches, or they do not
        have what the head needs.
    """
    check_not_offloaded(params, "losses are not computed")
    found = []
    for batch in batches:
        size = len(next(iter(batch.values()))) if batch_size is None else batch_size
        found.append(_evaluate(params, place_batch(batch, params, size), options))
    if not found:
        raise ValueError("no batches to evaluate on")
    losses, counts = np.array(jax.device_get(found), np.float64).T
    loss = float((losses * counts).sum() / max(counts.sum(), 1.0))
    if params.head != "causal_lm":
        return {"loss": loss}
    more = {} if bytes_per_token is None else {"bits_per_byte": loss / math.log(2) / bytes_per_token}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **more}
