"""The paper's optimizer: AdamW with warm-up and linear decay (Zhang et al. 2022, section 2.2)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from optjax.config import OPTConfig
from optjax.params import Params, build_params

from .options import StepOptions
from .placing import place, shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights are updated. Frozen and hashable: one recipe, one compiled program.

    The learning rate rises linearly over `warmup_steps`, stays at its peak until `decay_from`, and falls linearly to
    `final_fraction` of the peak at `total_steps`. With `decay_from` left out it falls from the end of the warm-up on,
    as the paper's does.

    Raises:
      ValueError: steps out of order, or a rate or coefficient that makes no sense.
    """

    peak_lr: float
    total_steps: int
    warmup_steps: int = 2000
    decay_from: int | None = None
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        decay_from = self.warmup_steps if self.decay_from is None else self.decay_from
        if not 0 <= self.warmup_steps <= decay_from <= self.total_steps:
            raise ValueError(
                f"expected 0 <= warmup_steps <= decay_from <= total_steps, got {self.warmup_steps}, {decay_from}, "
                f"{self.total_steps}"
            )
        if not self.peak_lr > 0 or not self.clip_norm > 0 or not self.eps > 0:
            raise ValueError("peak_lr, clip_norm and eps should be greater than 0")
        if not (0 <= self.final_fraction <= 1 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("final_fraction should lie in [0, 1], beta1 and beta2 in [0, 1)")
        object.__setattr__(self, "decay_from", decay_from)


def learning_rate(recipe: Recipe, step: jax.typing.ArrayLike) -> jax.Array:
    """The learning rate of the update that follows `step` finished ones: the first is peak_lr / warmup_steps, not 0."""
    done = jnp.asarray(step)
    warmup = (done + 1) / max(1, recipe.warmup_steps)
    decay_steps = max(1, recipe.total_steps - (recipe.decay_from or 0))
    gone = jnp.clip((done + 1 - (recipe.decay_from or 0)) / decay_steps, 0.0, 1.0)
    return recipe.peak_lr * jnp.minimum(warmup, 1.0 - (1.0 - recipe.final_fraction) * gone)


def decayed(config: OPTConfig, head: str | None = "causal_lm", *, stacked: bool = False) -> Params:
    """Which weights decay: the matrices; not the biases, not the norms. The same tree as the params, with bools."""
    return build_params(
        config, head, lambda weight, _: weight.kind in ("embedding", "linear", "output"), stacked=stacked
    )


@partial(jax.tree_util.register_dataclass, data_fields=["first", "second"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Moments:
    """AdamW's running means of the gradient and of its square: two trees like the params."""

    first: Params
    second: Params


def init_moments(params: Params, options: StepOptions) -> Moments:
    """Zeros, each where its weight lies, or in the memory of that device's host."""

    # On one device they stay where jax puts them: told where to lie they would make the first step another program.
    told = params.placement is not None or options.moments_memory != "device"

    def zeros() -> Params:
        return jax.tree.map(
            lambda w, sharding: jnp.zeros(w.shape, options.moments_dtype, device=sharding if told else None),
            params,
            shardings(params, options.moments_memory),
        )

    return Moments(zeros(), zeros())


def update(
    recipe: Recipe, params: Params, gradients: Params, moments: Moments, step: jax.Array
) -> tuple[Params, Moments, jax.Array]:
    """One update by AdamW (Loshchilov and Hutter 2019), the gradient clipped before it to a norm of ``clip_norm``.

    Decay is decoupled, and scaled by the learning rate, as in torch's AdamW. All is computed in float32.

    Args:
      step: the number of finished updates.

    Returns:
      The new weights and moments, and the norm of the gradient before it was clipped.
    """
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradients)))
    clip = jnp.where(norm < recipe.clip_norm, 1.0, recipe.clip_norm / norm)
    rate, count = learning_rate(recipe, step), (step + 1).astype(jnp.float32)
    unbias1, unbias2 = 1.0 - recipe.beta1**count, 1.0 - recipe.beta2**count

    def one(index, weight, gradient, first, second, decays):
        gradient = gradient * clip
        m = recipe.beta1 * first.astype(jnp.float32) + (1 - recipe.beta1) * gradient
        v = recipe.beta2 * second.astype(jnp.float32) + (1 - recipe.beta2) * jnp.square(gradient)
        change = (m / unbias1) / (jnp.sqrt(v / unbias2) + recipe.eps)
        if decays:
            change = change + recipe.weight_decay * weight
        new = weight - rate * change
        if first.dtype == jnp.float32:
            return new, m, v
        # The numbers are a function of weight and step, so that a run that resumes goes on with the same.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), index), step)
        bits = jax.random.bits(key, weight.shape, jnp.uint32)
        return new, _round(m, bits & 0xFFFF), _round(v, bits >> 16)

    decays = decayed(params.config, params.head, stacked=params.stacked)
    leaves, tree = jax.tree.flatten(params)
    others = [jax.tree.leaves(each) for each in (gradients, moments.first, moments.second, decays)]
    new = [one(i, *given) for i, given in enumerate(zip(leaves, *others, strict=True))]
    weights, first, second = (place(jax.tree.unflatten(tree, column)) for column in zip(*new, strict=True))
    return weights, Moments(first, second), norm


def _round(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16, up with a probability in proportion; ``noise`` is uint32 of 16 bits.

    Rounded to the nearest, a moment that changes by less than 1/512 of itself would not change at all.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)
