"""The static KV cache: keys and values of past tokens in buffers whose shapes never change.

Every call of `forward` writes its T columns at ``index``, the same columns for every row; ``mask`` remembers which
columns hold real tokens, so rows of different lengths and padding on either side live in one cache.

Two layouts, chosen by what the compiler makes of them:

- ``"heads"``, ``[B, H, S, K]`` for each layer: one batched matrix product with no transpose, right for CPU and GPU.
  For one row it is ``[H, S, K]``: XLA drops a dimension of 1 from matrix products, and on CPU the reshape that this
  takes between the write and the product would copy the whole buffer at every step.
- ``"flat"``, ``[B, S, D]``: for TPU, where one token's q, laid out block-diagonally, meets all heads' keys in a single
  matrix product on the matrix unit, instead of a multiply and reduce off it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.config import OPTConfig
from optjax.params import Params, floating_dtype
from optjax.placed import platform

LAYOUTS = ("heads", "flat")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "mask", "lengths", "index"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """A static KV cache of S columns.

    Attributes:
      keys, values: one array a layer, ``[B, H, S, K]`` (``[H, S, K]`` where B is 1) or ``[B, S, D]``, by ``layout``.
      mask: ``[B, S]`` bool, the columns that hold real tokens.
      lengths: ``[B]`` int32, how many real tokens each row holds: the position of its next one.
      index: int32 scalar, the column that the next call writes first; or ``[B]``, one for each of several rows.
      layout: ``"heads"`` or ``"flat"``.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    lengths: jax.Array
    index: jax.Array
    layout: str

    @property
    def batch_size(self) -> int:
        return self.mask.shape[0]

    @property
    def max_length(self) -> int:
        """S, the columns there are."""
        return self.mask.shape[1]


def init_cache(
    params: Params | OPTConfig,
    batch_size: int,
    max_length: int,
    dtype: Any = None,
    *,
    layout: str | None = None,
) -> Cache:
    """An empty cache for ``batch_size`` rows of ``max_length`` columns (padding takes columns, but no positions).

    Args:
      params: the params, or their config.
      dtype: of keys and values; the params' by default (float32 for a config).
      layout: ``"heads"`` or ``"flat"``; by default the one for the params' devices.

    For params on a mesh the cache lies there too: rows as the batch does, heads and columns by their own rules.

    Raises:
      ValueError: a size is not a positive integer, the dtype is not floating, or the layout is unknown.
    """
    if not isinstance(params, Params | OPTConfig):
        raise ValueError(f"a cache is made for params or a config, not for {type(params).__name__}")
    config = params.config if isinstance(params, Params) else params
    if dtype is None:
        dtype = params.dtype if isinstance(params, Params) else jnp.float32
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} of a cache should be a positive integer, not {size!r}")
    dtype = floating_dtype(dtype)
    placement = params.placement if isinstance(params, Params) else None
    if layout is None:
        layout = default_layout(platform(placement))
    if layout not in LAYOUTS:
        raise ValueError(f"no cache layout {layout!r}; there are: {', '.join(LAYOUTS)}")
    b, s, h, k = batch_size, max_length, config.num_attention_heads, config.head_dim
    shape = (b, s, h * k) if layout == "flat" else (h, s, k) if b == 1 else (b, h, s, k)
    axes = cache_axes(layout, b)

    def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, device=None if placement is None else placement.fitting(shape, axes))

    # Each buffer is its own array: a shared one could not be donated.
    keys, values = (tuple(zeros(shape, axes, dtype) for _ in range(config.num_hidden_layers)) for _ in range(2))
    mask, lengths = zeros((b, s), ("batch", None), bool), zeros((b,), ("batch",), jnp.int32)
    return Cache(keys, values, mask, lengths, zeros((), (), jnp.int32), layout)


def cache_axes(layout: str, batch_size: int) -> tuple[str | None, ...]:
    """The logical axes of one layer's keys or values."""
    if layout == "flat":
        return ("batch", "cache_length", "heads")
    return (*("batch",) * (batch_size > 1), "heads", "cache_length", None)


def default_layout(platform: str) -> str:
    """The layout for devices of a platform."""
    return "flat" if platform == "tpu" else "heads"


def write_columns(buffer: jax.Array, new: jax.Array, index: jax.Array, layout: str) -> jax.Array:
    """One layer's ``buffer`` with ``new`` ``[B, T, H, K]`` written at columns ``index`` to ``index + T``."""
    if index.ndim:
        one_row = partial(write_columns, layout=layout)
        return jax.vmap(lambda buffer, new, index: one_row(buffer, new[None], index))(buffer, new, index)
    t = new.shape[1]
    new = new.swapaxes(1, 2) if layout == "heads" else new
    new = new.reshape(*buffer.shape[:-2], t, buffer.shape[-1]).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis=-2)


def write_mask(mask: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """The cache's ``mask`` with ``new`` ``[B, T]`` written at columns ``index`` to ``index + T``."""
    if index.ndim:
        return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(mask, new, index, 0)
    return jax.lax.dynamic_update_slice_in_dim(mask, new, index, axis=1)


def keep_one_column(cache: Cache, chosen: jax.Array, n: int) -> Cache:
    """The cache with one of the n columns that were written last, for each row that which is ``chosen`` ``[B]``."""
    first = cache.index - n

    def keep(buffer: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(buffer, first, n, axis=-2)
        one_row = cache.layout == "heads" and cache.batch_size == 1
        where = chosen.reshape((1,) * buffer.ndim if one_row else (-1, *(1,) * (buffer.ndim - 1)))
        column = jnp.take_along_axis(columns, where, axis=-2)
        return jax.lax.dynamic_update_slice_in_dim(buffer, column, first, axis=-2)

    return dataclasses.replace(
        cache,
        keys=jax.tree.map(keep, cache.keys),
        values=jax.tree.map(keep, cache.values),
        mask=cache.mask & (jnp.arange(cache.max_length) <= first),
        lengths=cache.lengths - n + 1,
        index=first + 1,
    )


def reorder_cache(cache: Cache, rows: jax.Array) -> Cache:
    """The cache with rows picked ``[B']``: for several samples of a prompt, or for beams."""
    b, picked = cache.batch_size, rows.shape[0]

    def pick(buffer: jax.Array) -> jax.Array:
        if cache.layout == "heads" and b == 1:
            buffer = buffer[None]
        buffer = jnp.take(buffer, rows, axis=0)
        return buffer[0] if cache.layout == "heads" and picked == 1 else buffer

    return dataclasses.replace(
        cache,
        keys=tuple(map(pick, cache.keys)),
        values=tuple(map(pick, cache.values)),
        mask=cache.mask[rows],
        lengths=cache.lengths[rows],
        # Its own, as all else: either cache may be donated.
        index=jnp.array(cache.index),
    )
