"""What a training run carries from step to step, and the step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optjax.params import Params

from .loss import next_token_loss
from .optimizer import Recipe, learning_rate, optimizer


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree: weights, the optimizer's moments, and the number of finished steps (int32 scalar)."""

    params: Params
    opt_state: Any
    step: jax.Array


def init_state(params: Params, recipe: Recipe) -> TrainState:
    """A state before its first step. The params are float32: AdamW's small updates vanish in 16 bits.

    Raises:
      ValueError: the params are of another dtype.
    """
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if dtypes != {"float32"}:
        raise ValueError(f"training keeps its weights in float32, these are {', '.join(sorted(dtypes))}")
    tree: Any = params  # optax takes any pytree; its annotations name only some
    return TrainState(params, optimizer(recipe, params).init(tree), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def train_step(state: TrainState, records: jax.Array, recipe: Recipe, seed: int = 0):
    """One update on records `[B, T + 1]`. The old state's buffers are given up to the new one.

    `seed` matters where the config has dropout: a step's mask is a function of seed and step.

    Returns:
      The new state, and float32 scalars: `loss` (nats per token, before the update), `grad_norm` (before clipping)
      and `lr`.
    """
    config = state.params.config
    random = config.dropout > 0 or config.attention_dropout > 0 or config.layerdrop > 0
    key = jax.random.fold_in(jax.random.key(seed), state.step) if random else None
    loss, grads = jax.value_and_grad(next_token_loss)(state.params, records, key)
    tree: Any = state.params
    updates, opt_state = optimizer(recipe, state.params).update(grads, state.opt_state, tree)
    params: Any = optax.apply_updates(tree, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": learning_rate(recipe, state.step)}
    return TrainState(params, opt_state, state.step + 1), metrics
