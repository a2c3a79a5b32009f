"""Score processors for single tokens that may not come, or must: by the step, above all those that end a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.options import Settings


def min_new_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    without_eos = scores.at[:, settings.eos_ids].set(NEVER)
    return jnp.where(history.new < settings.min_new_tokens, without_eos, scores)


def suppress_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return jnp.where(settings.suppressed, NEVER, scores)
