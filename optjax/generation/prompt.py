"""Reading the prompts of `generate` into a new cache, after a prefix that was read before, if there is one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.cache import Cache, own_cache
from optjax.generation.chunks import read
from optjax.generation.prefix import continued
from optjax.generation.settings import Settings
from optjax.kernels.choice import good_columns
from optjax.params import Params


def read_prompts(
    params: Params, settings: Settings, ids: jax.Array, mask: jax.Array, room: int, keep: bool = False
) -> tuple[jax.Array, Cache]:
    """Reads prompts ``[B, T]`` whose real tokens stand at the right end, with ``room`` columns or more for others.

    Returns the last hidden states ``[B, T, E]``, or at least the last of them, ``[B, 1, E]``, unless all are to be
    kept; and the cache, in whose first columns the prefix stands, if there is one. Of the rows that guidance adds to
    those of the prompts none has it.
    """
    b, t = ids.shape
    prefix = settings.prefix
    filled = t + (0 if prefix is None else prefix.columns)
    room = good_columns(params.placement, filled + room, settings.attention_of_steps) - filled
    if prefix is None:
        cache = own_cache(params, b, t + room, settings.cache_dtype)
    else:
        has_prefix = None if settings.guidance is None else jnp.arange(b) < b // 2
        cache = continued(params, prefix, b, t + room, settings.cache_dtype, has_prefix)
    how = {"attn_implementation": settings.attn_implementation, "no_past": prefix is None}
    return read(params, ids, mask, cache, settings.prefill_chunk_size, keep, **how)
