"""What a training run carries from step to step, and the step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.config import OPTConfig
from optjax.params import Params, abstract_params
from optjax.placed import platform
from optjax.sharding.overlap import compile_overlapped

from .adamw import Moments, init_moments, update
from .backward import check_not_quantized, loss_and_gradients
from .batches import Batch, check_arrays
from .guard import Guard, abstract_guard, after_step, init_guard, loss_scale
from .optimizer import Recipe
from .options import PLAIN, StepOptions
from .placing import everywhere, place, shardings


@partial(jax.tree_util.register_dataclass, data_fields=["params", "moments", "step", "guard"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree: weights, the optimizer's moments, the number of finished steps (int32 scalar), and the `Guard`."""

    params: Params
    moments: Moments
    step: jax.Array
    guard: Guard


def init_state(params: Params, options: StepOptions = PLAIN) -> TrainState:
    """A state before its first step; moments lie where their weights do.

    Raises:
      ValueError: the params are quantized, or not float32, in which small updates do not vanish.
    """
    check_not_quantized(params)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if dtypes != {"float32"}:
        raise ValueError(f"training keeps its weights in float32, these are {', '.join(sorted(dtypes))}")
    sharding = None if params.placement is None else everywhere(params)
    step = jnp.zeros((), jnp.int32, device=sharding)
    return TrainState(params, init_moments(params, options), step, init_guard(options, sharding))


def abstract_state(
    config: OPTConfig,
    options: StepOptions = PLAIN,
    *,
    stacked: bool = False,
    head: str | None = "causal_lm",
    mesh: Any = None,
    rules: Any = None,
) -> TrainState:
    """The state as ``jax.ShapeDtypeStruct`` with shardings: for ahead-of-time compilation, restoring and planning.

    Raises:
      ValueError: as `abstract_params`.
    """
    params = abstract_params(config, head=head, stacked=stacked, mesh=mesh, rules=rules)

    def like(dtype: str, memory: str) -> Params:
        return jax.tree.map(
            lambda w, sharding: jax.ShapeDtypeStruct(w.shape, dtype, sharding=sharding),
            params,
            shardings(params, memory),
        )

    first, second = (like(options.moments_dtype, options.moments_memory) for _ in range(2))
    sharding = everywhere(params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    return TrainState(like("float32", "device"), Moments(first, second), step, abstract_guard(sharding))


@partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=0)
def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, seed: int = 0, options: StepOptions = PLAIN
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a batch (see `check_arrays`), by the loss of the params' head. The old state's buffers are given up
    to the new one.

    `seed` matters where the config has dropout: a step's masks are a function of seed and step, and of
    `options.micro_batches`. Where the loss or a gradient is not finite, weights and moments stay as they are, bit for
    bit, and the step counts all the same.

    Returns:
      The new state, and scalars: `loss` (nats per token, before the update), `grad_norm` (before clipping), `lr`,
      `loss_scale` (of this step) in float32, and `skipped`, int32: 1 where the update was left out.

    Raises:
      ValueError: the batch does not have what the head needs, or does not divide into micro-batches and over the
        devices, or its rows into their parts.
    """
    params, guard = state.params, state.guard
    check_batch(params, *check_arrays(params, batch), options)
    config = params.config
    random = config.dropout > 0 or config.attention_dropout > 0 or config.layerdrop > 0
    key = jax.random.fold_in(jax.random.key(seed), state.step) if random else None
    scale = loss_scale(guard, options)
    loss, gradients = loss_and_gradients(params, batch, key, options, scale)
    params, moments, metrics = update(
        recipe, params, place(gradients), state.moments, state.step, options, guard=guard, loss=loss
    )
    guard = after_step(guard, metrics["skipped"] == 0, options)
    metrics |= {"loss": loss, "loss_scale": jnp.float32(scale)}
    return TrainState(params, moments, state.step + 1, guard), metrics


def compile_step(
    state: TrainState, batch: Batch, recipe: Recipe, seed: int = 0, options: StepOptions = PLAIN
) -> jax.stages.Compiled:
    """`train_step` compiled for arrays like these, with `optjax.sharding.overlap_options`: (state, batch) → the same.

    Raises:
      ValueError: as `train_step`.
    """
    placement = state.params.placement
    lowered = train_step.lower(state, batch, recipe, seed, options)
    return compile_overlapped(lowered, None if placement is None else placement.mesh)


def check_batch(params: Params, rows: int, length: int, options: StepOptions) -> None:
    """Whether ids ``[rows, length]`` can be shared out.

    Raises:
      ValueError: they cannot; the message has the numbers.
    """
    longest = params.config.max_position_embeddings
    if not 1 <= length <= longest:
        raise ValueError(f"records of {length} tokens, but max_position_embeddings {longest}")
    parts = 1 if params.placement is None else params.placement.shards("batch")
    if rows % (options.micro_batches * parts):
        raise ValueError(
            f"a batch of {rows} records does not divide into {options.micro_batches} micro-batches over {parts} groups "
            f"of devices; it should be a multiple of {options.micro_batches * parts}"
        )
    shares = 1
    for axis in ("residual_length", "length"):
        shares = 1 if params.placement is None else params.placement.shards(axis)
        if length % shares:
            raise ValueError(
                f"records of {length} tokens do not divide over {shares} devices, as the rule for {axis!r} asks; take "
                "another length, or None for it in the rules"
            )
    options.block_of_queries(length, platform(params.placement))
    options.attention_kind(params, (rows // options.micro_batches, length))
    options.chunks_of_loss(length // shares, 1.0, platform(params.placement))
