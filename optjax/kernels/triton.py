"""Flash attention on GPU: jax's Pallas kernel, compiled by Triton, with its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as gpu


def attend(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array | None, *, block: int, interpret: bool):
    """Causal attention of T queries over their own keys, differentiable.

    Args:
      q, k, v: ``[B, T, H, K]``, q scaled; ``block`` divides T.
      real: ``[B, T]`` bool: real tokens look at real ones only, and padding at padding, so that no row is empty. Or
        int32: tokens look at those whose number is their own.

    Returns:
      ``[B, T, H, K]``.
    """
    # The backward pass holds twice as much of each block.
    half = max(block // 2, 16)
    sizes = gpu.BlockSizes(
        block_q=block, block_k=block, block_q_dkv=half, block_kv_dkv=half, block_q_dq=half, block_kv_dq=half
    )
    segments = None if real is None else real.astype(jnp.int32)
    return gpu.mha(q, k, v, segments, sm_scale=1.0, causal=True, block_sizes=sizes, interpret=interpret)
