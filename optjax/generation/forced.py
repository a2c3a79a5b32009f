"""Score processors for single tokens that may not come, or must: by the step, above all those that end a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.settings import Settings

# Far above every score, and far below what is no number any more.
_LARGE = 1e30


def min_length(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    short = history.count - history.first < settings.min_length
    return jnp.where(short[:, None], _without(scores, settings.eos_ids), scores)


def min_new_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return jnp.where(history.new < settings.min_new_tokens, _without(scores, settings.eos_ids), scores)


def forced_bos(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    alone = history.count - history.first == 1
    return jnp.where(alone[:, None], _only(scores, settings.forced_bos), scores)


def forced_eos(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    ids, tokens_before = settings.forced_eos
    return jnp.where(history.new == tokens_before, _only(scores, ids), scores)


def exponential_decay_length_penalty(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    start, factor = settings.decay
    since = history.new - start
    ends = scores[:, settings.eos_ids]
    growth = jnp.minimum(factor ** since.astype(jnp.float32) - 1, _LARGE)
    # An end that may not come stays so; transformers makes NaN of it, and of one that has grown beyond all numbers.
    more = jnp.where(jnp.isfinite(ends), jnp.minimum(jnp.abs(ends) * growth, _LARGE), 0.0)
    return jnp.where(since > 0, scores.at[:, settings.eos_ids].set(ends + more), scores)


def suppress_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return jnp.where(settings.suppressed, NEVER, scores)


def begin_suppress_tokens(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    prompt = history.count - history.new - history.first
    # After a single token there comes the forced one first.
    begin = jnp.where((prompt == 1) & (settings.forced_bos is not None), 1, 0)
    return jnp.where((history.new == begin)[:, None] & settings.begin_suppressed, NEVER, scores)


def _without(scores: jax.Array, ids: jax.Array) -> jax.Array:
    return scores.at[:, ids].set(NEVER)


def _only(scores: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.full_like(scores, NEVER).at[:, ids].set(0.0)
