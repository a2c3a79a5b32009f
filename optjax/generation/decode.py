"""The two steps of decoding, for `generate`'s loop and for those who write their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache import Cache, own_cache
from optjax.cache import cache_dtype as as_cache_dtype
from optjax.generation.chunks import as_chunk_size, read
from optjax.generation.prefix import Prefix, abstract_cache, check_prefix, continued
from optjax.heads import lm_logits
from optjax.kernels.choice import attention_kind, told
from optjax.model import Inputs, decoder
from optjax.params import Params
from optjax.validate import (
    as_array,
    as_ids,
    as_mask,
    check_cache,
    check_params,
    check_positions,
    check_range,
    check_rows_not_empty,
    is_concrete,
)


def prefill(
    params: Params,
    ids: Any,
    attention_mask: Any = None,
    *,
    max_length: int | None = None,
    cache: Cache | None = None,
    prefix: Prefix | None = None,
    cache_dtype: Any = None,
    prefill_chunk_size: int | None = None,
    attn_implementation: str = "auto",
) -> tuple[jax.Array, Cache]:
    """Reads a prompt: the next token's logits ``[B, V]`` in float32, and the cache that holds the prompt.

    Args:
      ids: ``[B, T]``; padding may stand anywhere.
      attention_mask: ``[B, T]`` bool or int; every row needs a real token.
      max_length: columns of a new cache: T and all the tokens to come.
      cache: or a cache to go on with, which is donated: a prompt may be read in chunks. Rows padded on the left may
        then have none but padding in the first chunks; their logits say nothing yet.
      prefix: from `read_prefix`; the new cache begins with its columns, which come on top of max_length.
      cache_dtype: of a new cache; see `optjax.generation.Options`.
      prefill_chunk_size: read so many columns at a time at most, in one program.
      attn_implementation: ``"eager"``, ``"flash"`` or ``"auto"``, as of `forward`.

    Raises:
      ValueError: ids, mask, cache or lengths that do not fit; ``attn_implementation="flash"`` where it cannot be had.
    """
    check_params(params, ("causal_lm",))
    ids = as_ids(ids, params.config.vocab_size)
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"cache should come from prefill or init_cache, got {type(cache).__name__}")
    mask = None if attention_mask is None else as_mask(attention_mask, ids.shape)
    if cache is not None:
        check_cache(params.config, cache)
    check_rows_not_empty(mask, cache)
    if (cache is None) == (max_length is None):
        raise ValueError("give either max_length, for a new cache, or cache")
    if cache is not None and (prefix is not None or cache_dtype is not None):
        raise ValueError("prefix and cache_dtype are of a new cache: give max_length, not cache")
    if prefix is not None:
        _check_after(params, prefix, ids, mask)
        if cache_dtype is not None and as_cache_dtype(cache_dtype) != prefix.cache.dtype:
            raise ValueError(f"cache_dtype {cache_dtype} is not that of the prefix, {prefix.cache.dtype}; leave it out")
    chunk_size = as_chunk_size(prefill_chunk_size)
    columns = 0
    if cache is None:
        if not isinstance(max_length, int | np.integer) or isinstance(max_length, bool):
            raise ValueError(f"max_length should be an integer, not {max_length!r}")
        if max_length < ids.shape[1]:
            raise ValueError(f"max_length {max_length} is less than the {ids.shape[1]} columns of the prompt")
        columns = int(max_length)
    if prefix is not None:
        queries = ids.shape[1] if chunk_size is None else min(chunk_size, ids.shape[1])
        kept = None if cache_dtype is None else as_cache_dtype(cache_dtype)
        after = abstract_cache(params, prefix, ids.shape[0], columns, kept)
        attention_kind(params, ids.shape[0], queries, cache=after, attn_implementation=attn_implementation)
        how = told(params, attn_implementation)
        return _prefill_after(params, ids, mask, prefix, columns, kept, chunk_size, how)
    check_positions(params.config, mask, None, cache, ids.shape)
    (b, t), no_past = ids.shape, cache is None
    if cache is None:
        cache = own_cache(params, b, columns, cache_dtype)
    queries = t if chunk_size is None else min(chunk_size, t)
    past, how = None if no_past and queries == t else cache, attn_implementation
    attention_kind(params, b, queries, cache=past, cache_dtype=cache.dtype, attn_implementation=how)
    return _prefill(params, ids, mask, cache, chunk_size, told(params, how), no_past)


def _check_after(params: Params, prefix: Any, ids: Any, mask: Any) -> None:
    """ValueError where a prompt does not fit after its prefix."""
    lengths = check_prefix(params, prefix, ids.shape[0])
    if mask is None or is_concrete(mask):
        lengths = lengths + (ids.shape[1] if mask is None else np.asarray(mask).sum(1))
    limit = params.config.max_position_embeddings
    if lengths.max() > limit:
        raise ValueError(
            f"{lengths.max()} tokens in a row, its prefix included, are more than max_position_embeddings = {limit}"
        )


def decode_step(
    params: Params, ids: Any, cache: Cache, *, attn_implementation: str = "auto"
) -> tuple[jax.Array, Cache]:
    """One more token ``[B]`` for each row: the next token's logits ``[B, V]`` in float32, and the cache.

    The cache given is donated: use the one that comes back. Nothing but shapes is checked, so that a loop does not
    wait for the device at each step: keep within the cache's max_length and the model's max_position_embeddings.

    Args:
      attn_implementation: ``"eager"``, ``"flash"`` or ``"auto"``, as of `forward`.

    Raises:
      ValueError: ids or cache of the wrong shape or type; ``attn_implementation="flash"`` where it cannot be had.
    """
    check_params(params, ("causal_lm",))
    ids = as_array(ids, "ids")
    if not isinstance(cache, Cache):
        raise ValueError(f"cache should come from prefill or init_cache, got {type(cache).__name__}")
    check_cache(params.config, cache)
    if ids.shape != (cache.batch_size,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids should be integers of shape {(cache.batch_size,)}, got {ids.dtype} {ids.shape}")
    if not isinstance(ids, jax.Array):
        check_range(ids, 0, params.config.vocab_size, "ids", "the vocabulary")
    if attn_implementation != "auto":
        attention_kind(params, ids.shape[0], 1, cache=cache, attn_implementation=attn_implementation)
    return _decode_step(params, ids.astype(jnp.int32), cache, told(params, attn_implementation))


@partial(jax.jit, donate_argnames="cache", static_argnames=("chunk_size", "kind", "no_past"))
def _prefill(
    params: Params,
    ids,
    mask,
    cache: Cache,
    chunk_size: int | None = None,
    kind: str = "eager",
    no_past: bool = False,
) -> tuple[jax.Array, Cache]:
    return _logits_after(params, ids, mask, cache, chunk_size, kind, no_past)


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _prefill_after(
    params: Params, ids, mask, prefix: Prefix, columns: int, dtype: Any, chunk_size: int | None, kind: str
) -> tuple[jax.Array, Cache]:
    cache = continued(params, prefix, ids.shape[0], columns, dtype)
    return _logits_after(params, ids, mask, cache, chunk_size, kind)


def _logits_after(
    params: Params, ids, mask, cache: Cache, chunk_size: int | None, kind: str, no_past: bool = False
) -> tuple[jax.Array, Cache]:
    x, cache = read(params, ids, mask, cache, chunk_size, attn_implementation=kind, no_past=no_past)
    if mask is None:
        last = x[:, -1]
    else:
        t = x.shape[1]
        column = jnp.max(jnp.where(mask, jnp.arange(t), 0), axis=1)
        last = jnp.take_along_axis(x, column[:, None, None], axis=1)[:, 0]
    return lm_logits(params, last), cache


@partial(jax.jit, donate_argnames="cache", static_argnames="kind")
def _decode_step(params: Params, ids, cache: Cache, kind: str = "auto") -> tuple[jax.Array, Cache]:
    return next_logits(params, ids, None, cache, kind)


def next_logits(
    params: Params, ids: jax.Array, active: jax.Array | None, cache: Cache, attn_implementation: str
) -> tuple[jax.Array, Cache]:
    """`decode_step` for use inside compiled programs; a row that is not ``active`` ``[B]`` takes no position."""
    mask = None if active is None else active[:, None]
    out = decoder(params, Inputs(ids=ids[:, None], mask=mask, cache=cache, attn_implementation=attn_implementation))
    assert out.cache is not None  # the decoder returns one where it was given one
    return lm_logits(params, out.last_hidden_state[:, 0]), out.cache
