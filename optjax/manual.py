"""Loops inside a `jax.shard_map` of the caller's, where a type says over which devices a value varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def as_after(step: Callable[[Any], Any], carry: Any) -> Any:
    """The carry of a loop, varying as it does after steps: a loop has to begin with the types that its steps give."""
    while jax.sharding.get_abstract_mesh().manual_axes:
        after = jax.eval_shape(step, carry)
        before, carry = carry, jax.tree.map(lambda x, like: jnp.where(True, x, jnp.zeros_like(like)), carry, after)
        # What one step makes vary may make more of it vary in the next.
        if _types(carry) == _types(before):
            break
    return carry


def _types(carry: Any) -> list[Any]:
    return [jax.typeof(x) for x in jax.tree.leaves(carry)]
