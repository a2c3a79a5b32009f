"""Prompts padded anywhere, as prompts padded on the left."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def right_aligned(ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids and mask ``[B, T]`` with the real tokens at the right end, in order, gaps closed."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(mask, order, axis=1)
