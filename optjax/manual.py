"""Loops inside a `jax.shard_map` of the caller's, where a type says over which devices a value varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def as_after(step: Callable[[Any], Any], carry: Any) -> Any:
    """The carry of a loop, varying as it does after steps: a loop has to begin with the types that its steps give."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    after = jax.eval_shape(step, carry)
    varying = jax.tree.map(lambda x, like: jnp.where(True, x, jnp.zeros_like(like)), carry, after)
    # What one step makes vary may make more of it vary in the next.
    return varying if _types(varying) == _types(carry) else as_after(step, varying)


def _types(carry: Any) -> list[Any]:
    return [jax.typeof(x) for x in jax.tree.leaves(carry)]
