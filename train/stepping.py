"""A train step as the loop calls it, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optjax.config import OPTConfig
from optjax.params import Params
from optjax.sharding.plan.analytic import attention_flops, causal_pairs, token_flops

from .placing import place_batch

Step = Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def step_function(compile: Callable[[Any, Any], Step], params: Params, batch_size: int) -> Step:
    """(state, this process's rows of a batch) → (state, metrics); compiled at the first batch of a shape.

    Args:
      compile: of a state and a placed batch.
      params: beside which batches are placed; they may be abstract.
      batch_size: rows of all processes.
    """
    compiled: dict[tuple[int, ...], Step] = {}

    def step(state: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
        placed = place_batch(batch, params, batch_size)
        shape = placed["input_ids"].shape
        if shape not in compiled:
            compiled[shape] = compile(state, placed)
        return compiled[shape](state, placed)

    return step


def model_flops(
    config: OPTConfig, batch_size: int, length: int, head: str | None = "causal_lm", *, frozen: bool = False
) -> float:
    """FLOPs of a step by which utilization is measured: forward, and backward by what goes in and by the weights, each
    as much. Attention is over the past alone; of the heads the vocabulary's counts.

    Args:
      frozen: the weights have no gradient, as beside adapters, whose own products are not counted.
    """
    tokens, pairs = batch_size * length, batch_size * causal_pairs(length)
    products, attention = token_flops(config, head == "causal_lm") * tokens, attention_flops(config, pairs)
    return (2 if frozen else 3) * products + 3 * attention
