"""Score processors for sampling alone: they sharpen a distribution, or cut its tail off."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.history import NEVER, History
from optjax.generation.settings import Settings
from optjax.generation.thresholds import kth_largest, mass_threshold


def temperature(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return scores / settings.temperature


def top_k(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Fan et al. 2018. Ties with the k-th score stay, as in transformers."""
    k = jnp.clip(settings.top_k, _fewest(settings, scores), scores.shape[-1])
    return jnp.where(scores >= kth_largest(scores, k), scores, NEVER)


def top_p(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Holtzman et al. 2020: keeps a token while the mass above it is less than top_p; ties stay together."""
    p = jax.nn.softmax(scores, axis=-1)
    return jnp.where((scores >= mass_threshold(scores, p, settings.top_p)) | _best(settings, scores), scores, NEVER)


def min_p(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Nguyen et al. 2024."""
    p = jax.nn.softmax(scores, axis=-1)
    return jnp.where((p >= settings.min_p * p.max(-1, keepdims=True)) | _best(settings, scores), scores, NEVER)


def typical_p(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Meister et al. 2022: the tokens whose surprise is nearest to the entropy, up to the mass typical_p."""
    log_p = jax.nn.log_softmax(scores, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(-1, keepdims=True)
    nearness = -jnp.abs(-log_p - entropy)
    near = nearness >= mass_threshold(nearness, p, settings.typical_p)
    return jnp.where(near | _best(settings, nearness), scores, NEVER)


def epsilon_cutoff(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Hewitt et al. 2022, truncation by probability; the most probable token stays."""
    return _cut(settings, scores, jax.nn.softmax(scores, axis=-1), settings.epsilon_cutoff)


def eta_cutoff(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Hewitt et al. 2022: the bound falls where the entropy is high; the most probable token stays."""
    log_p = jax.nn.log_softmax(scores, axis=-1)
    p, epsilon = jnp.exp(log_p), settings.eta_cutoff
    entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(-1, keepdims=True)
    return _cut(settings, scores, p, jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy)))


def _cut(settings: Settings, scores: jax.Array, p: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.where((p >= least) | _best(settings, scores), scores, NEVER)


def _best(settings: Settings, ranks: jax.Array) -> jax.Array:
    """The tokens ``[B, V]`` that stay in any case, those of the highest ranks."""
    fewest = _fewest(settings, ranks)
    return ranks >= (ranks.max(-1, keepdims=True) if fewest == 1 else kth_largest(ranks, jnp.int32(fewest)))


def _fewest(settings: Settings, scores: jax.Array) -> int:
    """How many tokens a warper leaves at least: in beam sampling so many that one may go on, whichever end."""
    return 1 if settings.beams is None else min(settings.candidates, scores.shape[-1])
