"""What keeps a run from a bad step: updates that are not finite are left out, and float16's loss is scaled."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .options import StepOptions


@partial(
    jax.tree_util.register_dataclass, data_fields=["lr_scale", "loss_scale", "good_steps", "skipped"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Guard:
    """Scalars of a train state.

    Attributes:
      lr_scale: float32; the learning rate is multiplied by it.
      loss_scale: float32; under float16 the loss is multiplied by it before the backward pass, so that small gradients
        do not vanish, and the gradients are divided by it after. Else 0: a run that goes on in float16 begins to look
        for it then.
      good_steps: int32; finite updates since the loss scale last changed. Else 0.
      skipped: int32; updates left out, ever, because the loss or a gradient was not finite.
    """

    lr_scale: jax.Array
    loss_scale: jax.Array
    good_steps: jax.Array
    skipped: jax.Array


def init_guard(options: StepOptions, sharding: Any = None) -> Guard:
    """A guard before the first step."""
    number, count = partial(jnp.full, (), device=sharding), partial(jnp.zeros, (), jnp.int32, device=sharding)
    return Guard(number(1.0, jnp.float32), number(first_scale(options), jnp.float32), count(), count())


def abstract_guard(sharding: Any) -> Guard:
    """The same as ``jax.ShapeDtypeStruct``."""
    number, count = (jax.ShapeDtypeStruct((), dtype, sharding=sharding) for dtype in (jnp.float32, jnp.int32))
    one: Any = Guard(number, number, count, count)  # pyright: ignore[reportArgumentType]
    return one


def first_scale(options: StepOptions) -> float:
    return options.loss_scale_init if options.scales_loss else 0.0


def loss_scale(guard: Guard, options: StepOptions) -> jax.Array | float:
    """What the loss of the next step is multiplied by."""
    if not options.scales_loss:
        return 1.0
    return jnp.where(guard.loss_scale > 0, guard.loss_scale, options.loss_scale_init)


def after_step(guard: Guard, finite: jax.Array, options: StepOptions) -> Guard:
    """The guard after an update that was made if it was ``finite``.

    The loss scale halves where it was not, down to a floor, and doubles after ``options.loss_scale_window`` updates in
    a row that were (Zhang et al. 2022, section 2.2; Micikevicius et al. 2018).
    """
    skipped = guard.skipped + jnp.where(finite, 0, 1)
    if not options.scales_loss:
        none = jnp.zeros_like(guard.loss_scale), jnp.zeros_like(guard.good_steps)
        return Guard(guard.lr_scale, *none, skipped)
    now = loss_scale(guard, options)
    good = jnp.where(finite, guard.good_steps + 1, 0)
    grows = good == options.loss_scale_window
    larger = jnp.where(jnp.isfinite(2.0 * now), 2.0 * now, now)
    smaller = jnp.maximum(0.5 * now, options.loss_scale_floor)
    scale = jnp.where(finite, jnp.where(grows, larger, now), smaller)
    return Guard(guard.lr_scale, scale, jnp.where(grows, 0, good), skipped)
