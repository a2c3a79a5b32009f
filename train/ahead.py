"""The train step as `optjax plan` compiles it: with abstract arguments, for devices that need not be there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optjax.config import OPTConfig
from optjax.sharding.overlap import overlap_options
from optjax.sharding.placement import Placement
from optjax.sharding.plan.program import Program

from .optimizer import Recipe
from .options import StepOptions
from .state import abstract_state, train_step

# Numbers of a recipe do not change what a step needs.
_RECIPE = Recipe(peak_lr=1e-4, total_steps=100_000)


def train_programs(
    config: OPTConfig, placement: Placement, *, batch: int, length: int, dropout: float = 0.0, **options: Any
) -> list[Program]:
    """One step of the language model on ``batch`` rows of ``length`` tokens, one document a row.

    Args:
      dropout: in place of the config's; attention_dropout and layerdrop are off.
      **options: of `StepOptions`.
    """
    config = config.replace(dropout=dropout, attention_dropout=0.0, layerdrop=0.0)
    step_options = StepOptions(**options)
    state = abstract_state(config, step_options, stacked=True, mesh=placement.mesh, rules=dict(placement.rules))
    shape = (batch, length)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.fitting(shape, ("batch", None)))
    groups: dict[str, Any] = {"weights": state.params}
    if step_options.moments_memory == "device":
        groups["optimizer state"] = state.moments
    gradients = {"gradients": state.params}  # one copy in float32, sharded as the weights
    arguments = (state, {"input_ids": rows, "labels": rows}, _RECIPE, 0, step_options)
    return [Program("train step", train_step, arguments, groups, gradients, overlap_options(placement.mesh))]
