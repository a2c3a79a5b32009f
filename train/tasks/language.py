"""A language model over examples: its loss on them, and what it writes after their beginnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from optjax import Params, Tokenizer, generate, unstack_layers
from optjax.heads import IGNORE_INDEX

from ..backward import batch_loss
from ..data.loader import take_rows
from ..head_loss import loss_counts, loss_scales
from ..options import StepOptions
from ..placing import place_batch, rows
from .causal import Example
from .inference import Collate
from .watch import Watch, nobody


def evaluate(
    params: Params, examples: Sequence[dict[str, Any]], collate: Collate, batch_size: int, options: StepOptions
) -> dict[str, float]:
    """``loss``, the mean in nats over all tokens that are learned, and ``perplexity``, its exponential."""
    found = [
        _loss(params, place_batch(batch, params, batch_size), options)
        for batch in _batches(examples, collate, batch_size, rows(params, batch_size))
    ]
    losses, counts = np.array(jax.device_get(found), np.float64).T
    loss = float((losses * counts).sum() / max(counts.sum(), 1.0))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@partial(jax.jit, static_argnums=2)
def _loss(params: Params, batch: dict[str, jax.Array], options: StepOptions) -> tuple[jax.Array, jax.Array]:
    return batch_loss(params, batch, loss_scales(params, batch), None, options), loss_counts(params, batch)


def _batches(examples: Sequence[dict[str, Any]], collate: Collate, batch_size: int, own: range) -> Iterator[Any]:
    """In order, similar lengths together; the last is filled with rows of which nothing counts."""
    ordered = sorted(examples, key=lambda example: -len(example["input_ids"]))
    nothing = ordered[-1] | {"labels": np.full_like(ordered[-1]["labels"], IGNORE_INDEX)}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        batch += [nothing] * (batch_size - len(batch))
        yield take_rows(collate(batch), own)


def beginnings(examples: Sequence[Example], tokens: int = 8) -> list[np.ndarray]:
    """What the model is to go on from: the prompts, or the first tokens of texts that have none."""
    return [example.ids[: example.first or min(tokens, example.length)] for example in examples]


def write(
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    watch: Watch = nobody,
) -> list[str]:
    """What the model writes after each prompt, up to ``</s>``; the likeliest tokens where the temperature is 0.

    Raises:
      ValueError: as `optjax.generate`: prompts that leave no room for ``max_new_tokens``.
    """
    params = unstack_layers(params)
    options: dict[str, Any] = {"suppress_tokens": tokenizer.unused_ids(params.config.vocab_size)}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        part = [prompts[i] for i in places]
        part += part[-1:] * (batch_size - len(part))  # one shape, and one program
        width = len(part[0])
        ids = np.full((batch_size, width), tokenizer.eos_token_id, np.int32)
        mask = np.zeros((batch_size, width), np.int32)
        for line, seen, prompt in zip(ids, mask, part, strict=True):
            line[width - len(prompt) :], seen[width - len(prompt) :] = prompt, 1
        if temperature > 0:
            options["key"] = jax.random.fold_in(jax.random.key(seed), start)
        made = np.asarray(generate(params, ids, mask, max_new_tokens=max_new_tokens, **options))
        for i, row in zip(places, made[:, width:], strict=False):
            ends = np.flatnonzero(row == tokenizer.eos_token_id)
            texts[i] = tokenizer.decode(row[: ends[0]] if len(ends) else row)
        watch(start + len(places))
    return texts
