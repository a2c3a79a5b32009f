"""The two steps of decoding, for `generate`'s loop and for those who write their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache import Cache, init_cache
from optjax.heads import lm_logits
from optjax.model import Inputs, decoder
from optjax.params import Params
from optjax.validate import as_array, as_ids, as_mask, check_params, check_positions, check_range, is_concrete


def prefill(
    params: Params, ids: Any, attention_mask: Any = None, *, max_length: int | None = None, cache: Cache | None = None
) -> tuple[jax.Array, Cache]:
    """Reads a prompt: the next token's logits ``[B, V]`` in float32, and the cache that holds the prompt.

    Args:
      ids: ``[B, T]``; padding may stand anywhere.
      attention_mask: ``[B, T]`` bool or int; every row needs a real token.
      max_length: columns of a new cache: T and all the tokens to come.
      cache: or a cache to go on with, which is donated: a prompt may be read in chunks. Rows padded on the left may
        then have none but padding in the first chunks; their logits say nothing yet.

    Raises:
      ValueError: ids, mask, cache or lengths that do not fit.
    """
    check_params(params, ("causal_lm",))
    ids = as_ids(ids, params.config.vocab_size)
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"cache should come from prefill or init_cache, got {type(cache).__name__}")
    mask = None if attention_mask is None else as_mask(attention_mask, ids.shape)
    check_rows_not_empty(mask, cache)
    if (cache is None) == (max_length is None):
        raise ValueError("give either max_length, for a new cache, or cache")
    columns = 0
    if cache is None:
        if not isinstance(max_length, int | np.integer):
            raise ValueError(f"max_length should be an integer, not {max_length!r}")
        if max_length < ids.shape[1]:
            raise ValueError(f"max_length {max_length} is less than the {ids.shape[1]} columns of the prompt")
        columns = int(max_length)
    check_positions(params.config, mask, None, cache, ids.shape)
    if cache is None:
        cache = init_cache(params, ids.shape[0], columns)
    return _prefill(params, ids, mask, cache)


def decode_step(params: Params, ids: Any, cache: Cache) -> tuple[jax.Array, Cache]:
    """One more token ``[B]`` for each row: the next token's logits ``[B, V]`` in float32, and the cache.

    The cache given is donated: use the one that comes back. Nothing but shapes is checked, so that a loop does not
    wait for the device at each step: keep within the cache's max_length and the model's max_position_embeddings.

    Raises:
      ValueError: ids or cache of the wrong shape or type.
    """
    check_params(params, ("causal_lm",))
    ids = as_array(ids, "ids")
    if not isinstance(cache, Cache):
        raise ValueError(f"cache should come from prefill or init_cache, got {type(cache).__name__}")
    if ids.shape != (cache.batch_size,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids should be integers of shape {(cache.batch_size,)}, got {ids.dtype} {ids.shape}")
    if not isinstance(ids, jax.Array):
        check_range(ids, 0, params.config.vocab_size, "ids", "the vocabulary")
    return _decode_step(params, ids.astype(jnp.int32), cache)


@partial(jax.jit, donate_argnames="cache")
def _prefill(params: Params, ids, mask, cache: Cache) -> tuple[jax.Array, Cache]:
    out = decoder(params, Inputs(ids=ids, mask=mask, cache=cache))
    x = out.last_hidden_state
    if mask is None:
        last = x[:, -1]
    else:
        t = x.shape[1]
        column = jnp.max(jnp.where(mask, jnp.arange(t), 0), axis=1)
        last = jnp.take_along_axis(x, column[:, None, None], axis=1)[:, 0]
    return lm_logits(params, last), _has_cache(out.cache)


@partial(jax.jit, donate_argnames="cache")
def _decode_step(params: Params, ids, cache: Cache) -> tuple[jax.Array, Cache]:
    return next_logits(params, ids, None, cache)


def next_logits(params: Params, ids: jax.Array, active: jax.Array | None, cache: Cache) -> tuple[jax.Array, Cache]:
    """`decode_step` for use inside compiled programs; a row that is not ``active`` ``[B]`` takes no position."""
    mask = None if active is None else active[:, None]
    out = decoder(params, Inputs(ids=ids[:, None], mask=mask, cache=cache))
    return lm_logits(params, out.last_hidden_state[:, 0]), _has_cache(out.cache)


def check_rows_not_empty(mask: Any | None, cache: Cache | None = None) -> None:
    """ValueError if a row has no real token; of a prompt read in chunks, none after its first ones."""
    if mask is None or not is_concrete(mask) or (cache is not None and not is_concrete(cache.lengths)):
        return
    empty = ~np.asarray(mask).any(1)
    if cache is None:
        advice = "give each row a token, such as the BOS token"
    else:
        empty &= np.asarray(cache.lengths) > 0
        advice = "pad chunked prompts on the left, where the logits of every row are those after its last token"
    if empty.any():
        raise ValueError(f"attention_mask is all 0 in row {int(empty.argmax())}: {advice}")


def _has_cache(cache: Cache | None) -> Cache:
    assert cache is not None  # the decoder returns one where it was given one
    return cache
