"""Attention of a token of each row, or a few, over a cache, by the kernels of the devices at hand."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from optjax.attention import attend as attend_plainly
from optjax.cache import default_layout
from optjax.cache_codes import Buffer, Codes
from optjax.kernels.choice import interprets, kernel_platform
from optjax.placed import on_each

if TYPE_CHECKING:
    from optjax.sharding import Placement

_FLAT = ("batch", None, "heads")
_MASK = ("batch", None, None)
_TOKENS = ("batch", None, "heads", None)
_IN_HEADS = ("batch", "heads", None, None)


@dataclasses.dataclass(frozen=True)
class Decode:
    """How the tokens of each row look at the columns of a cache, by ``mask`` ``[B, T, S]`` bool."""

    placement: Placement | None
    mask: jax.Array

    def __call__(self, q: jax.Array, k: Buffer, v: Buffer) -> jax.Array:
        """``[B, T, D]`` of scaled queries ``[B, T, H, K]`` over the keys and values of a cache, as they lie there."""
        return _decode(self.placement, q, k, v, self.mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(placement: Placement | None, q: jax.Array, k: Buffer, v: Buffer, mask: jax.Array) -> jax.Array:
    """The gradient is that of the plain path."""
    if kernel_platform(placement) == "gpu":
        return _decode_on_gpu(placement, q, k, v, mask)
    return _decode_on_tpu(placement, q, k, v, mask)


def _decode_on_tpu(placement, q, k, v, mask):
    from optjax.kernels import decode_tpu

    b, t, _, head_dim = q.shape

    def attend(q, mask, *buffers):
        return decode_tpu.attend(q, mask, buffers, head_dim=head_dim, interpret=interprets())

    arrays, axes = _arrays((k, v), _FLAT)
    return on_each(placement, attend, [q.reshape(b, t, -1), mask, *arrays], [_FLAT, _MASK, *axes], _FLAT)


def _decode_on_gpu(placement, q, k, v, mask):
    from optjax.kernels import decode_gpu

    def attend(q, mask, *buffers):
        return decode_gpu.attend(q, mask, buffers, interpret=interprets())

    arrays, axes = _arrays((k, v), _IN_HEADS)
    if q.shape[0] == 1:
        arrays = [x[None] for x in arrays]  # a cache of one row has no dimension for it
    out = on_each(placement, attend, [q, mask, *arrays], [_TOKENS, _MASK, *axes], _TOKENS)
    return out.reshape(*q.shape[:2], -1)


def _arrays(buffers: Any, axes: Any) -> tuple[list[jax.Array], list[Any]]:
    """The arrays of keys and values, codes before scales, with the logical axes of each."""
    pairs = []
    for each in buffers:
        pairs += [(each.codes, axes), (each.scales, _IN_HEADS[:3])] if isinstance(each, Codes) else [(each, axes)]
    return [array for array, _ in pairs], [of for _, of in pairs]


def _decode_backward(placement: Placement | None, arrays: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    q, k, v, mask = arrays
    layout = default_layout(kernel_platform(placement))
    groups = 1 if placement is None else placement.shards("heads")

    def plain(q: jax.Array, k: Buffer, v: Buffer) -> jax.Array:
        return attend_plainly(q, k, v, mask[:, None], layout=layout, groups=groups)[0]

    return *jax.vjp(plain, q, k, v)[1](cotangent), None


_decode.defvjp(lambda placement, *arrays: (_decode(placement, *arrays), arrays), _decode_backward)
