"""A beginning that many prompts share, read once: a system prompt, or the examples of a few-shot prompt."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache import Cache, fast_dtype, fits, grow_cache, init_cache, map_columns, reorder_cache
from optjax.cache import cache_dtype as as_cache_dtype
from optjax.generation.aligned import right_aligned
from optjax.generation.buckets import pad_to_bucket
from optjax.generation.chunks import as_chunk_size, read
from optjax.kernels.choice import spread_by_hand
from optjax.params import Params
from optjax.placed import constrain
from optjax.validate import (
    as_ids,
    as_mask,
    check_not_donated,
    check_params,
    check_positions,
    check_range,
    check_rows_not_empty,
    is_concrete,
)


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "ids", "hidden"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What `read_prefix` read, for one row or several.

    Attributes:
      cache: of its P columns.
      ids: ``[b, P]`` int32, its tokens, as score processors and stop strings look at them.
      hidden: ``[b, P, E]``, the last hidden states.
    """

    cache: Cache
    ids: jax.Array
    hidden: jax.Array

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    @property
    def columns(self) -> int:
        """P, the prefix' columns, padding among them."""
        return self.cache.max_length


def read_prefix(
    params: Params,
    ids: Any,
    attention_mask: Any = None,
    *,
    cache_dtype: Any = None,
    prefill_chunk_size: int | None = None,
) -> Prefix:
    """Reads a beginning that many prompts share, such as a system prompt, once.

    `generate`, `stream`, `prefill` and `score` take it as ``prefix=``, as often as one likes, and give what they would
    for the whole text; it is not changed. A prefix of one row serves any number of prompts, one of B rows B prompts,
    each its own. In transformers it would be ``past_key_values``, copied for each use, with ids that repeat its tokens;
    here ``ids`` are what follows, and may be padded anywhere.

    Args:
      params: with the ``causal_lm`` head.
      ids: ``[b, P]``, padded anywhere; with the BOS, which the prompts then do without.
      attention_mask: ``[b, P]`` bool or int; all ones by default.
      cache_dtype, prefill_chunk_size: see `optjax.generation.Options`.

    Raises:
      ValueError: ids or mask that do not fit, more tokens than max_position_embeddings.
    """
    config = check_params(params, ("causal_lm",)).config
    ids = as_ids(ids, config.vocab_size)
    mask = np.ones(ids.shape, bool) if attention_mask is None else as_mask(attention_mask, ids.shape)
    check_rows_not_empty(mask)
    check_positions(config, mask, None, None, ids.shape)
    dtype = None if cache_dtype is None else as_cache_dtype(cache_dtype)
    chunk_size = as_chunk_size(prefill_chunk_size)
    ids, mask = pad_to_bucket(*((np.asarray(x) if is_concrete(x) else x) for x in (ids, mask)))
    kind = "eager" if spread_by_hand(params) else "auto"
    return _read_prefix(params, ids, mask, dtype=dtype, chunk_size=chunk_size, kind=kind)


@partial(jax.jit, static_argnames=("dtype", "chunk_size", "kind"))
def _read_prefix(params: Params, ids, mask, *, dtype: Any, chunk_size: int | None, kind: str) -> Prefix:
    ids, mask = right_aligned(jnp.asarray(ids), jnp.asarray(mask))
    rows, columns = ids.shape
    empty, how = init_cache(params, rows, columns, dtype), {"attn_implementation": kind, "no_past": True}
    hidden, cache = read(params, ids, mask, empty, chunk_size, **how)
    return Prefix(cache, ids, hidden)


def check_prefix(params: Params, prefix: Any, rows: int) -> np.ndarray:
    """The tokens of a prefix in each row ``[B]``; 1 where not known, as inside somebody's ``jit``.

    Raises:
      ValueError: it is no prefix, or one of another model, or for another number of rows.
    """
    if not isinstance(prefix, Prefix):
        raise ValueError(f"prefix should come from read_prefix, got {type(prefix).__name__}")
    config, cache = params.config, prefix.cache
    check_not_donated(cache, "the prefix's cache")
    if not fits(config, cache) or prefix.hidden.shape[-1] != config.embed_dim:
        raise ValueError("the prefix was read by a model of another shape; read it with these params")
    check_range(prefix.ids, 0, config.vocab_size, "the prefix's ids", "the vocabulary")
    if prefix.batch_size not in (1, rows):
        raise ValueError(f"the prefix has {prefix.batch_size} rows, and ids have {rows}; it should have 1 or as many")
    lengths = np.asarray(cache.lengths) if is_concrete(cache.lengths) else np.ones(prefix.batch_size, np.int32)
    return np.broadcast_to(lengths, rows)


def continued(
    params: Params,
    prefix: Prefix,
    rows: int,
    columns: int,
    dtype: Any = None,
    has_prefix: jax.Array | None = None,
) -> Cache:
    """A new cache that goes on after the prefix, with so many more columns: a copy for each row.

    Several rows of a prefix go to rows in turn. Rows that are not to have it ``[B]`` get its columns masked. Without a
    dtype, which may be the prefix's own, it is kept as `own_cache` would be.
    """
    cache = reorder_cache(prefix.cache, jnp.arange(rows) % prefix.batch_size)
    kept = fast_dtype(params, cache.dtype) if dtype is None else dtype
    if kept != cache.dtype:
        cache = map_columns(lambda buffer, _: buffer.astype(kept), cache)
    if has_prefix is not None:
        mask, lengths = cache.mask & has_prefix[:, None], jnp.where(has_prefix, cache.lengths, 0)
        cache = dataclasses.replace(cache, mask=mask, lengths=lengths)
    lengths = constrain(params.placement, cache.lengths, "batch")
    cache = dataclasses.replace(cache, lengths=lengths)
    return grow_cache(cache, cache.max_length + columns, params.placement)


def abstract_cache(params: Params, prefix: Prefix, rows: int, columns: int, dtype: Any = None) -> Cache:
    """What `continued` would make, as shapes alone."""
    return jax.eval_shape(lambda prefix: continued(params, prefix, rows, columns, dtype), prefix)


def before(prefix: Prefix | None, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prompts ``[B, T]`` with the prefix before them, ``[B, P + T]``."""
    if prefix is None:
        return ids, mask
    rows = jnp.arange(ids.shape[0]) % prefix.batch_size
    return jnp.concatenate([prefix.ids[rows], ids], 1), jnp.concatenate([prefix.cache.mask[rows], mask], 1)


def states_before(prefix: Prefix | None, hidden: jax.Array) -> jax.Array:
    """Last hidden states ``[B, T, E]`` with those of the prefix before them."""
    if prefix is None:
        return hidden
    rows = jnp.arange(hidden.shape[0]) % prefix.batch_size
    return jnp.concatenate([prefix.hidden[rows].astype(hidden.dtype), hidden], 1)
