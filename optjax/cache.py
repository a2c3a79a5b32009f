"""The static KV cache: keys and values of past tokens in buffers whose shapes never change.

Every call of `forward` writes its T columns at ``index``, the same columns for every row; ``mask`` remembers which
columns hold real tokens, so rows of different lengths and padding on either side live in one cache.

Two layouts, chosen by what the compiler makes of them:

- ``"heads"``, ``[B, H, S, K]`` for each layer: one batched matrix product with no transpose, right for CPU and GPU.
  For one row it is ``[H, S, K]``: XLA drops a dimension of 1 from matrix products, and on CPU the reshape that this
  takes between the write and the product would copy the whole buffer at every step.
- ``"flat"``, ``[B, S, D]``: for TPU, where one token's q, laid out block-diagonally, meets all heads' keys in a single
  matrix product on the matrix unit, instead of a multiply and reduce off it.

Of int8 the buffers are `Codes`, in the same layouts: each head of a token has a scale of its own, so that a column is
quantized once, when it is written, and attention reads the codes as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache_codes import Buffer, Codes, encode, map_buffer
from optjax.config import OPTConfig
from optjax.params import Params, floating_dtype, wider
from optjax.placed import constrain, platform

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
      keys, values: one array a layer, ``[B, H, S, K]`` (``[H, S, K]`` where B is 1) or ``[B, S, D]``, by ``layout``;
        of int8 `Codes` of that shape.
      mask: ``[B, S]`` bool, the columns that hold real tokens.
      lengths: ``[B]`` int32, how many real tokens each row holds: the position of its next one.
      index: int32 scalar, the column that the next call writes first; or ``[B]``, one for each of several rows.
      layout: ``"heads"`` or ``"flat"``.
    """

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]
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

    @property
    def dtype(self) -> np.dtype:
        """Of keys and values; int8 where they are quantized."""
        return self.keys[0].dtype


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
      dtype: of keys and values; the params' by default (float32 for a config). ``"int8"`` quantizes each head of each
        token as it is written, and takes 1 + 4/K bytes a number. On a CPU 16 bits are slow: XLA widens all of them at
        each step.
      layout: ``"heads"`` or ``"flat"``; by default the one for the params' devices.

    For params on a mesh the cache lies there too: rows as the batch does, heads and columns by their own rules.

    Raises:
      ValueError: a size is not a positive integer, the dtype is neither floating nor int8, or the layout is unknown.
    """
    if not isinstance(params, Params | OPTConfig):
        raise ValueError(f"a cache is made for params or a config, not for {type(params).__name__}")
    config = params.config if isinstance(params, Params) else params
    if dtype is None:
        dtype = params.dtype if isinstance(params, Params) else jnp.float32
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} of a cache should be a positive integer, not {size!r}")
    dtype = cache_dtype(dtype)
    placement = params.placement if isinstance(params, Params) else None
    if layout is None:
        layout = default_layout(platform(placement))
    if layout not in LAYOUTS:
        raise ValueError(f"no cache layout {layout!r}; there are: {', '.join(LAYOUTS)}")
    b, s, h = batch_size, max_length, config.num_attention_heads
    rows = () if layout == "heads" and b == 1 else (b,)
    shape, scales = (*rows, *_columns(config, s, layout)), (*rows, h, s)
    axes = cache_axes(layout, b)

    def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, device=None if placement is None else placement.fitting(shape, axes))

    def buffer() -> Buffer:
        values = zeros(shape, axes, dtype)
        return Codes(values, zeros(scales, scale_axes(scales), jnp.float32)) if dtype == jnp.int8 else values

    # Each buffer is its own array: a shared one could not be donated.
    keys, values = (tuple(buffer() for _ in range(config.num_hidden_layers)) for _ in range(2))
    mask, lengths = zeros((b, s), ("batch", None), bool), zeros((b,), ("batch",), jnp.int32)
    return Cache(keys, values, mask, lengths, zeros((), (), jnp.int32), layout)


def _columns(config: OPTConfig, columns: int, layout: str) -> tuple[int, ...]:
    """The shape of one row's keys or values."""
    if layout == "flat":
        return columns, config.hidden_size
    return config.num_attention_heads, columns, config.head_dim


def fits(config: OPTConfig, cache: Cache) -> bool:
    """Whether a cache is one for a model of these shapes. Of a flat one the heads are not known, unless it is int8."""
    row = _columns(config, cache.max_length, cache.layout)
    heads = (config.num_attention_heads, cache.max_length)

    def one(buffer: Buffer) -> bool:
        return buffer.shape[-len(row) :] == row and (not isinstance(buffer, Codes) or buffer.scales.shape[-2:] == heads)

    # All layers have one shape; a loop of decode_step asks at every token.
    return (
        len(cache.keys) == len(cache.values) == config.num_hidden_layers and one(cache.keys[0]) and one(cache.values[0])
    )


def own_cache(params: Params, batch_size: int, max_length: int, dtype: Any = None) -> Cache:
    """`init_cache` as `generate` and others have it for themselves: on one CPU at least float32, unless told."""
    return init_cache(params, batch_size, max_length, fast_dtype(params, params.dtype) if dtype is None else dtype)


def fast_dtype(params: Params, dtype: Any) -> np.dtype:
    """The dtype in which keys and values of ``dtype`` are best kept: on one CPU at least float32, but for int8."""
    placement = params.placement
    alone_on_cpu = platform(placement) == "cpu" and (placement is None or placement.mesh.size == 1)
    widen = alone_on_cpu and jnp.issubdtype(dtype, jnp.floating)
    return wider(dtype, jnp.float32) if widen else jnp.dtype(dtype)


def cache_axes(layout: str, batch_size: int) -> tuple[str | None, ...]:
    """The logical axes of one layer's keys or values."""
    if layout == "flat":
        return ("batch", "cache_length", "heads")
    return (*("batch",) * (batch_size > 1), "heads", "cache_length", None)


def scale_axes(shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The logical axes of their scales, ``[B, H, S]`` or ``[H, S]``."""
    return ("batch", "heads", "cache_length")[-len(shape) :]


def cache_dtype(dtype: Any) -> np.dtype:
    """The dtype of a cache from anything that names one: floating, or int8.

    Raises:
      ValueError: it names none.
    """
    try:
        return np.dtype(np.int8) if jnp.dtype(dtype) == jnp.int8 else floating_dtype(dtype)
    except (TypeError, ValueError):
        raise ValueError(f"a cache is of a floating dtype such as jnp.bfloat16, or of int8, not {dtype!r}") from None


def default_layout(platform: str) -> str:
    """The layout for devices of a platform."""
    return "flat" if platform == "tpu" else "heads"


def write_columns(buffer: Buffer, new: jax.Array, index: jax.Array, layout: str) -> Buffer:
    """One layer's ``buffer`` with ``new`` ``[B, T, H, K]`` written at columns ``index`` to ``index + T``."""
    if index.ndim:
        one_row = partial(write_columns, layout=layout)
        return jax.vmap(lambda buffer, new, index: one_row(buffer, new[None], index))(buffer, new, index)
    if isinstance(buffer, Codes):
        codes, scales = encode(new)
        return Codes(
            _write(buffer.codes, codes if layout == "flat" else codes.swapaxes(1, 2), index, -2),
            _write(buffer.scales, scales.swapaxes(1, 2), index, -1),
        )
    return _write(buffer, new.swapaxes(1, 2) if layout == "heads" else new, index, -2)


def _write(buffer: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    shape = list(buffer.shape)
    shape[axis] = new.size // (buffer.size // shape[axis])
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.reshape(shape).astype(buffer.dtype), index, axis=axis)


def write_mask(mask: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """The cache's ``mask`` with ``new`` ``[B, T]`` written at columns ``index`` to ``index + T``."""
    if index.ndim:
        return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(mask, new, index, 0)
    return jax.lax.dynamic_update_slice_in_dim(mask, new, index, axis=1)


def map_columns(function: Callable[[jax.Array, int], jax.Array], cache: Cache) -> Cache:
    """The cache with a function of an array, and its axis of columns, on each array of keys and values."""
    keys, values = (tuple(map_buffer(function, each) for each in layers) for layers in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)


def grow_cache(cache: Cache, columns: int, placement: Any = None) -> Cache:
    """The cache with so many columns, the new ones empty: a copy."""
    more = columns - cache.max_length
    axes = cache_axes(cache.layout, cache.batch_size)

    def grow(buffer: jax.Array, axis: int) -> jax.Array:
        ends = [(0, 0)] * buffer.ndim
        ends[axis] = (0, more)
        return constrain(placement, jnp.pad(buffer, ends), *(axes if axis == -2 else scale_axes(buffer.shape)))

    mask = constrain(placement, jnp.pad(cache.mask, ((0, 0), (0, more))), "batch", None)
    return dataclasses.replace(map_columns(grow, cache), mask=mask)


def keep_one_column(cache: Cache, chosen: jax.Array, n: int) -> Cache:
    """The cache with one of the n columns that were written last, for each row that which is ``chosen`` ``[B]``."""
    first = cache.index - n

    def keep(buffer: jax.Array, axis: int) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(buffer, first, n, axis)
        where = chosen.reshape(-1, *(1,) * (buffer.ndim - 1))  # of one row [1], whatever stands first
        column = jnp.take_along_axis(columns, where, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(buffer, column, first, axis)

    return dataclasses.replace(
        map_columns(keep, cache),
        mask=cache.mask & (jnp.arange(cache.max_length) <= first),
        lengths=cache.lengths - n + 1,
        index=first + 1,
    )


def reorder_cache(cache: Cache, rows: jax.Array) -> Cache:
    """The cache with rows picked ``[B']``: for several samples of a prompt, or for beams."""
    b, picked = cache.batch_size, rows.shape[0]

    def pick(buffer: jax.Array, axis: int) -> jax.Array:
        if cache.layout == "heads" and b == 1:
            buffer = buffer[None]
        buffer = jnp.take(buffer, rows, axis=0)
        return buffer[0] if cache.layout == "heads" and picked == 1 else buffer

    return dataclasses.replace(
        map_columns(pick, cache),
        mask=cache.mask[rows],
        lengths=cache.lengths[rows],
        # Its own, as all else: either cache may be donated.
        index=jnp.array(cache.index),
    )
