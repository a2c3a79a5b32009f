"""Attention over a block of queries at a time, so that the scores of all of them never exist together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from optjax.attention import attend_heads, by_heads, weights_of
from optjax.cache_codes import Buffer
from optjax.placed import parts

if TYPE_CHECKING:
    from optjax.sharding import Placement

# Scores of a block, of all rows and heads of a device, should not take more bytes than this, or little more. A block
# has a multiple of so many queries: all keys are read again for it, and a matrix unit is that wide.
_BYTES = 128 << 20
_QUERIES = 128


def block_of_queries(placement: Placement | None, rows: int, queries: int, keys: int, heads: int) -> int | None:
    """How many queries to attend at a time; None for all of them."""
    each = 4 * rows * queries * keys * heads / parts(placement, rows, "batch") / parts(placement, heads, "heads")
    n = -(-each // parts(placement, queries, "length") // _BYTES)
    block = -(-queries // int(n) // _QUERIES) * _QUERIES
    return None if block >= queries else block


def attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    block: int,
    interleaved: bool,
    head_mask: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    on_cpu: bool = False,
    on_gpu: bool = False,
) -> jax.Array:
    """`attend` without a past (layout ``"heads"``, S = T) for blocks that divide T: ``[B, T, D]`` and no weights.

    Scores exist for ``block`` queries at a time, and are computed again in the backward pass. A block looks at no key
    beyond its last query. Where the devices share out T, blocks are ``interleaved`` instead (every n-th query), so that
    each device has its part of every block.
    """
    b, t, h, d = q.shape
    n = t // block

    # Without the barrier of prevent_cse the compiler finds the same scores in the forward pass, and keeps them.
    @jax.checkpoint
    def attend_block(q, k, v, mask, rows):
        def weigh(scores: jax.Array) -> jax.Array:
            return weights_of(scores, mask, head_mask, dropout, dropout_key, rows, t)

        return attend_heads(q, k, v, weigh, on_cpu, on_gpu)[0]

    queries = jnp.arange(t)
    outs = []
    for i in range(n):
        if interleaved:
            one = q.reshape(b, block, n, h, d)[:, :, i]
            its_mask = mask.reshape(-1, 1, block, n, t)[:, :, :, i]
            outs.append(attend_block(one, k, v, its_mask, queries[i::n]))
        else:
            rows, keys = slice(i * block, (i + 1) * block), slice((i + 1) * block)
            one_k, one_v = k[..., keys, :], v[..., keys, :]
            outs.append(attend_block(q[:, rows], one_k, one_v, mask[:, :, rows, keys], queries[rows]))
    if interleaved:
        return jnp.stack(outs, 2).reshape(b, t, h * d)
    return jnp.concatenate(outs, 1)


def attend_all_keys_in_blocks(
    q: jax.Array,
    k: Buffer,
    v: Buffer,
    mask: jax.Array,
    *,
    layout: str,
    block: int,
    interleaved: bool,
    head_mask: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    on_cpu: bool = False,
    on_gpu: bool = False,
) -> jax.Array:
    """`attend` for any T and S, as a loop: ``[B, T, D]`` and no weights.

    Where the past is in a cache, which keys a block could leave out is not known before the program runs.
    """
    b, t, h, d = q.shape
    n = -(-t // block)

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, n * block - t if i == axis else 0) for i in range(x.ndim)])
        sizes = (block, n) if interleaved else (n, block)
        x = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + interleaved, 0)

    @jax.checkpoint
    def attend_block(each):
        q, mask, rows = each

        def weigh(scores: jax.Array) -> jax.Array:
            return weights_of(scores, mask, head_mask, dropout, dropout_key, rows)

        # By heads in here: else the whole cache would be laid out as this product likes it, in a copy that lasts.
        keys, values = (by_heads(x, h) for x in (k, v)) if layout == "flat" else (k, v)
        return attend_heads(q, keys, values, weigh, on_cpu, on_gpu)[0]

    out = jax.lax.map(attend_block, (split(q, 1), split(mask, 2), split(jnp.arange(t), 0)))
    out = jnp.moveaxis(out, 0, 1 + interleaved).reshape(b, n * block, h * d)
    return out[:, :t]
