"""A long prompt read in chunks, inside one compiled program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache import Cache, write_mask
from optjax.manual import as_after
from optjax.model import Inputs, decoder
from optjax.params import Params


def read(
    params: Params,
    ids: jax.Array,
    mask: jax.Array | None,
    cache: Cache,
    chunk_size: int | None,
    keep: bool = True,
    *,
    attn_implementation: str,
    no_past: bool = False,
) -> tuple[jax.Array, Cache]:
    """Reads ``[B, T]`` into the cache, at most ``chunk_size`` columns at a time; None for all.

    Returns the last hidden states ``[B, T, E]``, or at least the last of them, ``[B, 1, E]``, unless all are to be
    kept; and the cache. Chunks are one loop, so that what is computed on the way is that of one of them. It begins
    where the first real token of any row is: what padding there is before that takes no time. ``no_past`` says that
    the cache is empty; of chunks all are read as if it were not.
    """
    t = ids.shape[1]
    if chunk_size is None or chunk_size >= t:
        inputs = Inputs(ids=ids, mask=mask, cache=cache, attn_implementation=attn_implementation, no_past=no_past)
        out = decoder(params, inputs)
        assert out.cache is not None  # the decoder returns one where it was given one
        return out.last_hidden_state, out.cache
    mask = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask)
    size = _chunk(t, chunk_size)
    start, rest = cache.index, t % size
    # What is skipped, too, has its columns' mask.
    cache = dataclasses.replace(cache, mask=write_mask(cache.mask, mask, start))

    def one(first: jax.Array | int, size: int, cache: Cache) -> tuple[jax.Array, Cache]:
        its_ids, its_mask = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (ids, mask))
        past = dataclasses.replace(cache, index=start + first)
        inputs = Inputs(ids=its_ids, mask=its_mask, cache=past, attn_implementation=attn_implementation)
        out = decoder(params, inputs)
        assert out.cache is not None
        return out.last_hidden_state if keep else out.last_hidden_state[:, -1:], out.cache

    def put(hidden: jax.Array, x: jax.Array, first: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(hidden, x, first, axis=1) if keep else x

    # The columns that are left over come first, so that the last chunk is a whole one.
    x, cache = one(0, rest, cache) if rest else (None, cache)
    hidden = jnp.zeros((ids.shape[0], t if keep else 1, params.config.embed_dim), params.dtype)
    hidden = hidden if x is None else put(hidden, x, 0)

    def step(i: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        hidden, cache = carry
        x, cache = one(rest + i * size, size, cache)
        return put(hidden, x, rest + i * size), cache

    first_real = jnp.argmax(mask.any(0)).astype(jnp.int32)  # 0 where there is none; columns count in int32 in x64 too
    begin = jnp.maximum(first_real - rest, 0) // size
    carry = as_after(lambda carry: step(begin, carry), (hidden, cache))
    hidden, cache = jax.lax.fori_loop(begin, t // size, step, carry)
    return hidden, dataclasses.replace(cache, index=start + t)


def as_chunk_size(value: Any) -> int | None:
    """A ``prefill_chunk_size``, or a ValueError."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and (not whole or value < 1):
        raise ValueError(f"prefill_chunk_size should be an integer of at least 1, not {value!r}")
    return None if value is None else int(value)


def _chunk(t: int, most: int) -> int:
    """The largest chunk that divides T, if that is at least half of the largest there may be, else that one."""
    divides = max(size for size in range(1, most + 1) if t % size == 0)
    return divides if 2 * divides >= most else most
