"""Attention of one pass by the kernels of the devices at hand, on each device for its own rows and heads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from optjax.attention import causal_mask
from optjax.attention_blocks import attend_all_keys_in_blocks, block_of_queries
from optjax.kernels.choice import interprets, kernel_platform
from optjax.placed import on_each

if TYPE_CHECKING:
    from optjax.sharding import Placement

_HEADS = ("batch", "heads", None, None)


@dataclasses.dataclass(frozen=True)
class Flash:
    """How the queries of a pass look at their keys.

    Attributes:
      real: ``[B, T]`` bool, which of the tokens are no padding; None where all are (or where ``real_keys`` say).
      real_keys: ``[B, S]`` bool, the same of keys in a cache; None where the keys are those of the tokens.
      index: the column of the cache that the first token is in.
      segments: ``[B, T]`` int32, in place of ``real``: tokens look at those of their own segment only.
    """

    placement: Placement | None
    real: jax.Array | None = None
    real_keys: jax.Array | None = None
    index: jax.Array | None = None
    segments: jax.Array | None = None

    @property
    def own_keys(self) -> bool:
        """Whether the tokens look at their own keys only, whatever a cache holds."""
        return self.real_keys is None

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """``[B, T, D]`` of scaled queries ``[B, T, H, K]`` over keys and values ``[B, H, S, K]``, causally.

        What a padding token gets means nothing. It is what the plain path gives on TPU; on GPU, where the kernel has
        one mask for queries and keys, padding looks at padding.
        """
        b, t, h, d = q.shape
        groups = self.real if self.segments is None else self.segments
        if kernel_platform(self.placement) == "gpu":
            out = _on_gpu(self.placement, q, k, v, groups)
        elif self.own_keys:
            out = _on_tpu(self.placement, q, k, v, groups)
            if self.real is not None:
                out = _where_none(jnp.cumsum(self.real, axis=1) == 0, v, out)
        else:
            assert self.real_keys is not None and self.index is not None  # both come with a cache
            out = _over_cache(self.placement, q, k, v, self.real_keys, self.index)
            seen = jax.lax.dynamic_slice_in_dim(jnp.cumsum(self.real_keys, axis=1), self.index, t, axis=1)
            out = _where_none(seen == 0, v, out)
        return out.reshape(b, t, h * d)


def _where_none(none: jax.Array, v: jax.Array, out: jax.Array) -> jax.Array:
    """``out`` ``[B, T, H, K]``, but for queries ``[B, T]`` that see no key the mean of all values, as by softmax."""
    mean = v.mean(2, dtype=jnp.float32).astype(out.dtype)[:, None]
    return jnp.where(none[:, :, None, None], mean, out)


def _on_tpu(placement, q, k, v, groups):
    from optjax.kernels import splash

    t = q.shape[1]
    block, padded = _blocks(t, (512, 256, 128))

    def attend(q, k, v, *groups):
        mask = groups[0] if groups else None
        return splash.attend(q, k, v, mask, block=block, interpret=interprets())

    arrays = [_pad(x, 2, padded) for x in (q.swapaxes(1, 2), k, v)]
    out = on_each(placement, attend, arrays + _masks(groups, padded), [_HEADS] * 3 + [("batch", None)], _HEADS)
    return out[:, :, :t].swapaxes(1, 2)


def _on_gpu(placement, q, k, v, groups):
    from optjax.kernels import triton

    t = q.shape[1]
    # More does not fit into a core's memory, which is 99 KB on all GPUs but those of data centers.
    wide = q.dtype == jnp.float32 and q.shape[3] > 64
    block, padded = _blocks(t, (32, 16) if wide else (64, 32, 16))

    def attend(q, k, v, *groups):
        mask = groups[0] if groups else None
        return triton.attend(q, k, v, mask, block=block, interpret=interprets())

    axes = ("batch", None, "heads", None)
    arrays = [_pad(x, 1, padded) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))]
    out = on_each(placement, attend, arrays + _masks(groups, padded), [axes] * 3 + [("batch", None)], axes)
    return out[:, :t]


def _over_cache(placement, q, k, v, real, index):
    """On TPU. The gradient is that of the plain path."""
    from optjax.kernels import splash

    t, s = q.shape[1], k.shape[2]
    (block, padded), (block_keys, padded_keys) = _blocks(t, (512, 256, 128)), _blocks(s, (512, 256, 128))

    def attend(q, k, v, real, index):
        return splash.attend_with_past(q, k, v, real, index, blocks=(block, block_keys), interpret=interprets())

    @jax.custom_vjp
    def flash(q, k, v, real, index):
        arrays = [_pad(q.swapaxes(1, 2), 2, padded), _pad(k, 2, padded_keys), _pad(v, 2, padded_keys)]
        arrays += [_pad(real, 1, padded_keys), index]
        axes = [_HEADS] * 3 + [("batch", None), ()]
        return on_each(placement, attend, arrays, axes, _HEADS)[:, :, :t].swapaxes(1, 2)

    def plain(q, k, v, real, index):
        mask = causal_mask(real, index + jnp.arange(t, dtype=jnp.int32))
        block = block_of_queries(placement, q.shape[0], t, s, q.shape[2]) or t
        out = attend_all_keys_in_blocks(q, k, v, mask, layout="heads", block=block, interleaved=False)
        return out.reshape(q.shape)

    def forward(*arrays):
        return flash(*arrays), arrays

    def backward(arrays, cotangent):
        q, k, v, real, index = arrays
        gradients = jax.vjp(lambda q, k, v: plain(q, k, v, real, index), q, k, v)[1](cotangent)
        return *gradients, None, None

    flash.defvjp(forward, backward)
    return flash(q, k.astype(q.dtype), v.astype(q.dtype), real, index)


def _blocks(length: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """The tokens that are taken at a time, and the length that they divide, padding included.

    The largest size that divides it; of a long row half the largest at least, and some padding for that.
    """
    largest, least = sizes[0], sizes[-1]
    unit = least if length <= largest else largest // 2
    padded = -(-length // unit) * unit
    return next(size for size in sizes if padded % size == 0), padded


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _masks(groups: Any | None, padded: int) -> list[jax.Array]:
    """Padding to a block's end stands after all else, where causality alone hides it."""
    return [] if groups is None else [_pad(jnp.asarray(groups), 1, padded)]
