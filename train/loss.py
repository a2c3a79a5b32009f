"""What training minimizes, and the same number on text that is not trained on."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from optjax.heads import IGNORE_INDEX, causal_lm, cross_entropy
from optjax.params import Params

from .backward import batch_loss, check_not_quantized
from .data import PackedText
from .options import PLAIN, StepOptions
from .placing import place_records


def next_token_loss(params: Params, records: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy in nats per token of records `[B, T + 1]`: T inputs and, one further on, T labels."""
    logits = causal_lm(params, records[:, :-1], dropout_key=dropout_key).logits
    return cross_entropy(logits, records[:, 1:])


@partial(jax.jit, static_argnums=2)
def _evaluate(params: Params, records: jax.Array, options: StepOptions) -> jax.Array:
    scale = 1.0 / jnp.maximum((records[:, 1:] != IGNORE_INDEX).sum(), 1).astype(jnp.float32)
    return batch_loss(params, records, scale, None, options)


def evaluate(
    params: Params,
    text: PackedText,
    batch_size: int,
    max_batches: int | None = None,
    options: StepOptions = PLAIN,
) -> dict[str, float]:
    """The loss on the first records of a text, in their order, without dropout.

    Returns:
      `loss`, nats per token, and `bits_per_byte`, which compares across tokenizers. Each record is predicted from its
      own beginning on, so both are a little higher than with a sliding window.

    Raises:
      ValueError: the params are quantized; `next_token_loss` takes those too.
    """
    check_not_quantized(params)
    batch_size = min(batch_size, text.records)
    batches = text.records // batch_size
    batches = batches if max_batches is None else min(batches, max_batches)
    losses = []
    for i in range(batches):
        records = place_records(text.take(range(i * batch_size, (i + 1) * batch_size)), params)
        losses.append(float(_evaluate(params, records, options)))
    loss = float(np.mean(losses))
    return {"loss": loss, "bits_per_byte": loss / math.log(2) / text.bytes_per_token}
