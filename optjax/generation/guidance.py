"""Classifier-free guidance: scores pushed away from what would follow another prompt (Sanchez et al. 2023).

The other branch, "unconditional" or a negative prompt, is another row of the same batch and cache, after all rows of
the prompts: a step reads the weights once for both.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.generation.aligned import right_aligned


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "ids", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Guidance:
    """The options about it.

    Attributes:
      scale: above 1 away from the other branch, below 1 towards it.
      ids, mask: negative prompts ``[B, T]``; None for the last token of each prompt.
    """

    scale: Any
    ids: Any = None
    mask: Any = None


def with_other_branch(guidance: Guidance | None, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prompts ``[B, T]`` whose real tokens stand at the right end, and after them the rows they are compared with."""
    if guidance is None:
        return ids, mask
    if guidance.ids is None:
        others, their_mask = ids, mask & (jnp.arange(ids.shape[1]) == ids.shape[1] - 1)
    else:
        others, their_mask = right_aligned(guidance.ids, guidance.mask)
    width = max(ids.shape[1], others.shape[1])

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (width - x.shape[1], 0)))

    return jnp.concatenate([pad(ids), pad(others)]), jnp.concatenate([pad(mask), pad(their_mask)])


def guide(guidance: Guidance | None, logits: jax.Array) -> jax.Array:
    """Scores ``[B, V]`` from the logits ``[2B, V]`` of both branches; the logits as they are where there is one."""
    if guidance is None:
        return logits
    own, other = jnp.split(jax.nn.log_softmax(logits, axis=-1), 2)
    return guidance.scale * (own - other) + other


def twice(guidance: Guidance | None, x: jax.Array) -> jax.Array:
    """What both branches get ``[2B]``, from that of the rows ``[B]``."""
    return x if guidance is None else jnp.concatenate([x, x])
