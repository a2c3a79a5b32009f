"""The paper's recipe: AdamW with warm-up and linear decay (Zhang et al. 2022, section 2.2)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from optjax.config import OPTConfig
from optjax.params import Params, build_params


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
