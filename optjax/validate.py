"""Checks of what a caller hands in, made before anything is compiled.

JAX does not raise on an index out of range: it clamps, or gives NaN. So ids, positions and labels are looked at here
while they are concrete; inside somebody's own ``jit`` only shapes and dtypes can be.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optjax.cache import Cache, fits
from optjax.config import OPTConfig
from optjax.params import Params


def is_concrete(*values: Any) -> bool:
    """Whether the content of all values may be looked at: none is a tracer, or lies on other hosts of a pod."""

    def here(leaf: Any) -> bool:
        if isinstance(leaf, Tracer):
            return False
        return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated

    return all(here(leaf) for leaf in jax.tree.leaves(values))


def check_params(params: Any, heads: tuple[str | None, ...] | None = None) -> Params:
    if not isinstance(params, Params):
        raise ValueError(
            f"expected optjax params, got {type(params).__name__}; make them with init_params or load_params"
        )
    if heads is not None and params.head not in heads:
        raise ValueError(
            f"these params have head {params.head!r}, and this function needs {' or '.join(map(repr, heads))}; "
            f"load or initialize them with head={heads[0]!r}"
        )
    return params


def as_ids(ids: Any, vocab_size: int, name: str = "ids") -> jax.Array | np.ndarray:
    """Ids as an int32 array ``[B, T]``."""
    array = as_array(ids, name)
    if isinstance(array, np.ndarray) and array.dtype.kind in "US":
        raise ValueError(f"{name} should be integers, got text; {name}, mask = tokenizer(texts) makes them")
    if array.ndim != 2:
        raise ValueError(f"{name} should have shape [B, T], got {_instead(ids, array, name)}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} should be integers, got {array.dtype}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: shape {array.shape}")
    check_range(array, 0, vocab_size, name, "the vocabulary")
    return as_int32(array)


def _instead(ids: Any, array: jax.Array | np.ndarray, name: str) -> str:
    """What was given in place of ids, and what to do."""
    if array.ndim == 1:
        added = f"{name}[None]" if hasattr(ids, "ndim") else f"[{name}]"  # a list has no None to be indexed by
        return f"{array.shape}; add a batch axis: {added}"
    if isinstance(ids, tuple) and len(ids) == 2 and array.ndim == 3:
        return f"a pair of {array.shape[1:]}; a tokenizer gives {name} and mask: pass each as its own argument"
    return str(array.shape)


def as_array(value: Any, name: str) -> jax.Array | np.ndarray:
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array: {error}; pad the rows to one length") from None
    if array.dtype == object:
        raise ValueError(f"{name} is not an array of numbers, but {type(value).__name__}")
    return array


def as_int32(array: Any) -> jax.Array | np.ndarray:
    """Integers in 32 bits: in fewer a sum with an offset could wrap around."""
    return _cast(array, np.int32)


def _cast(array: Any, dtype: Any) -> Any:
    """The array in another dtype; on the host where it can be, as an operation on the device would be compiled."""
    if array.dtype == dtype:
        return array
    return (np.asarray(array) if is_concrete(array) else array).astype(dtype)


def check_range(array: Any, low: int, high: int, name: str, what: str, allowed: int | None = None) -> None:
    """ValueError unless every concrete element is in ``low … high-1``, or ``allowed``."""
    if not is_concrete(array) or array.size == 0:
        return
    host = np.asarray(array)
    bad = (host < low) | (host >= high)
    if allowed is not None:
        bad &= host != allowed
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        also = "" if allowed is None else f" (or {allowed})"
        raise ValueError(f"{name}{list(where)} is {host[where]}, outside {what}: {low} to {high - 1}{also}")


def as_count(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number within limits, as an int."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} should be an integer {limit}, not {value!r}")
    return int(value)


def as_mask(mask: Any, shape: tuple[int, int], name: str = "attention_mask") -> jax.Array | np.ndarray:
    """A mask as bool ``[B, T]``; bool or int given, nonzero is True."""
    array = as_array(mask, name)
    if array.shape != shape:
        raise ValueError(f"{name} should have shape {shape}, as the ids of this call have, got {array.shape}")
    if array.dtype != bool and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} should be bool or int, got {array.dtype}")
    return _cast(array, bool)


def as_head_mask(head_mask: Any, config: OPTConfig) -> jax.Array | np.ndarray:
    """A head mask as ``[L, H]``, from that or ``[H]``."""
    array = as_array(head_mask, "head_mask")
    full = (config.num_hidden_layers, config.num_attention_heads)
    if array.shape not in (full, full[1:]):
        raise ValueError(f"head_mask should have shape {full} or {full[1:]}, got {array.shape}")
    if array.dtype != bool and not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise ValueError(f"head_mask should be bool, int or floating point, got {array.dtype}")
    return np.broadcast_to(np.asarray(array), full) if is_concrete(array) else jnp.broadcast_to(array, full)


def check_not_donated(cache: Cache, what: str = "the cache") -> None:
    """ValueError where a cache was given away."""
    if not isinstance(cache.index, Tracer) and isinstance(cache.index, jax.Array) and cache.index.is_deleted():
        raise ValueError(f"{what} was donated to an earlier call; go on with the cache that came back from it")


def check_cache(config: OPTConfig, cache: Cache) -> None:
    """ValueError where a cache is of a model of another shape, or was given away."""
    check_not_donated(cache)
    if not fits(config, cache):
        raise ValueError(
            f"the cache is of a model of another shape: {len(cache.keys)} layers of {cache.keys[0].shape}, and this "
            f"model has {config.num_hidden_layers}, with {config.num_attention_heads} heads of {config.head_dim}; make "
            "it with init_cache(params, …)"
        )


def check_positions(
    config: OPTConfig,
    mask: Any | None,
    position_ids: Any | None,
    cache: Cache | None,
    shape: tuple[int, int],
) -> None:
    """ValueError where a token would get a position past the table's end, or a column past the cache's; or where the
    cache is none to write to."""
    b, t = shape
    limit = config.max_position_embeddings
    if cache is not None:
        check_cache(config, cache)
        if cache.batch_size != b:
            raise ValueError(f"the cache is for {cache.batch_size} rows, and ids have {b}")
        used = int(cache.index) if is_concrete(cache.index) else 0
        if used + t > cache.max_length:
            raise ValueError(
                f"the cache has {cache.max_length} columns, {used} in use, and cannot take {t} more; "
                f"make it with init_cache(params, batch_size, max_length={used + t} or more)"
            )
    if position_ids is not None:
        if position_ids.shape not in ((b, t), (1, t)):
            raise ValueError(f"position_ids should have shape {(b, t)}, got {position_ids.shape}")
        if not jnp.issubdtype(position_ids.dtype, jnp.integer):
            raise ValueError(f"position_ids should be integers, got {position_ids.dtype}")
        # -1 is what a masked slot gets.
        check_range(position_ids, -1, limit, "position_ids", "the position table (max_position_embeddings)")
        return
    held = np.zeros(b, np.int64)
    if cache is not None and is_concrete(cache.lengths):
        held = np.asarray(cache.lengths)
    if mask is None:
        longest = int(held.max()) + t
    elif is_concrete(mask):
        longest = int((held + np.asarray(mask).sum(1)).max())
    else:
        return
    if longest > limit:
        raise ValueError(
            f"{longest} tokens in a row are more than max_position_embeddings = {limit}; shorten the input"
        )


def check_rows_not_empty(mask: Any | None, cache: Cache | None = None, name: str = "attention_mask") -> None:
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
        raise ValueError(f"{name} is all 0 in row {int(empty.argmax())}: {advice}")
