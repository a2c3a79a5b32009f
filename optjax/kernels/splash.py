"""Flash attention on TPU: jax's splash attention, a Pallas kernel, with its gradient; and over a cache that has a past.

Scores exist for a block of queries and keys at a time, in the core's own memory, and blocks that nothing may look at
are neither read nor computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

# A block's scores are made over so many keys at a time.
_KEYS_AT_ONCE = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array | None, *, block: int, interpret: bool):
    """Causal attention of T queries over their own keys, differentiable.

    Args:
      q, k, v: ``[B, H, T, K]``, q scaled; ``block`` divides T.
      real: ``[B, T]`` bool, the keys that are looked at; a query that sees none gets something finite. Or int32: a
        query looks at the keys whose number is its own.

    Returns:
      ``[B, H, T, K]``.
    """
    t, at_once = q.shape[2], min(block, _KEYS_AT_ONCE)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((t, t))] * q.shape[1])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    if real is None:
        return jax.vmap(kernel)(q, k, v)
    segments = _segments(t, real) if real.dtype == bool else splash.SegmentIds(real, real)
    return jax.vmap(kernel)(q, k, v, segments)


def attend_with_past(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    real: jax.Array,
    index: jax.Array,
    *,
    blocks: tuple[int, int],
    interpret: bool,
):
    """`attend` of queries ``[B, H, T, K]`` in columns ``index`` to ``index + T`` of S keys ``[B, H, S, K]``.

    ``index`` is a traced scalar: which blocks of keys are read is settled when the program runs. There is no gradient.

    Args:
      real: ``[B, S]`` bool, as of `attend`.
      blocks: of queries and of keys; they divide T and S.
    """
    (block, block_keys), t, s = blocks, q.shape[2], k.shape[2]
    n, n_keys = t // block, s // block_keys
    last = jnp.minimum((index + block * (1 + jnp.arange(n)) - 1) // block_keys, n_keys - 1)[:, None]
    columns = jnp.arange(n_keys)
    info = MaskInfo(
        # What is not looked at is not fetched: the next block of keys is then the one that is there.
        data_next=jnp.minimum(columns, last)[None].astype(jnp.int32),
        mask_next=None,
        block_mask=(columns <= last)[None].astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=index.astype(jnp.int32) + jnp.arange(t, dtype=jnp.int32),  # pyright: ignore[reportArgumentType]
    )
    kernel = splash.SplashAttentionKernel(
        info,
        None,
        None,
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block_keys, block_kv_compute=min(block_keys, _KEYS_AT_ONCE)
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_not_ahead,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, _segments(t, real))


def _segments(queries: int, real: jax.Array) -> Any:
    """Every query is in segment 1, and so are the keys that may be looked at."""
    return splash.SegmentIds(jnp.ones((real.shape[0], queries), jnp.int32), real.astype(jnp.int32))


def _not_ahead(query_columns: jax.Array, key_columns: jax.Array) -> jax.Array:
    return query_columns >= key_columns
