"""Attention over keys and values, in the layouts they come in. Scores and softmax in float32 whatever the dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Finite, so that a row with every key masked stays finite in every dtype (Hugging Face #17433).
MASKED = -1e30

AttentionWeights = jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    layout: str,
    head_mask: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, AttentionWeights]:
    """Attention of T queries over S keys.

    Args:
      q: ``[B, T, H, K]``, already scaled by K^-0.5.
      k, v: ``[B, H, S, K]`` or, of one row, ``[H, S, K]`` (layout ``"heads"``), or ``[B, S, D]`` (``"flat"``).
      mask: ``[B, 1, T, S]`` bool, True where a query may look.
      head_mask: ``[H]``; multiplies each head's weights after the softmax.
      dropout, dropout_key: of the attention weights.

    Returns:
      ``[B, T, D]``, and the weights ``[B, H, T, S]`` in float32 (dead code to the compiler where nobody asks for them).
    """
    product = _attend_heads if layout == "heads" else _attend_flat
    return product(q, k, v, lambda scores: _weights(scores, mask, head_mask, dropout, dropout_key))


def _weights(scores, mask, head_mask, dropout, dropout_key) -> jax.Array:
    """Weights ``[B, H, T, S]`` from scores of the same shape."""
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    if dropout_key is not None and dropout > 0:
        weights = drop(weights, dropout, dropout_key)
    if head_mask is not None:
        weights = weights * head_mask.astype(weights.dtype)[:, None, None]
    return weights


def _attend_heads(q, k, v, weigh) -> tuple[jax.Array, jax.Array]:
    b, t, h, d = q.shape
    # Without the batch dimension where k has none: see cache.py.
    q = q.reshape(*k.shape[:-3], t, h, d)
    scores = jnp.einsum("...thk,...hsk->...hts", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    weights = weigh(scores.reshape(b, h, t, -1))
    per_head = weights.astype(q.dtype).reshape(scores.shape)
    out = jnp.einsum("...hts,...hsk->...thk", per_head, v.astype(q.dtype))
    return out.reshape(b, t, h * d), weights


def _attend_flat(q, k, v, weigh) -> tuple[jax.Array, jax.Array]:
    b, t, h, d = q.shape
    if t > 1:
        k, v = (x.reshape(b, -1, h, d).swapaxes(1, 2) for x in (k, v))
        return _attend_heads(q, k, v, weigh)
    # One query: lay q out block-diagonally, [B, D, H], so that all heads' scores are one matrix product with the flat
    # keys. It multiplies H times more zeros, on a unit that waits for memory anyway.
    own = jnp.repeat(jnp.eye(h, dtype=q.dtype), d, axis=1)  # [H, D]: the columns that are a head's own
    blocks = q.reshape(b, h * d, 1) * own.T
    scores = jnp.einsum("bsd,bdh->bhs", k.astype(q.dtype), blocks, preferred_element_type=jnp.float32)
    weights = weigh(scores[:, :, None, :])
    all_pairs = jnp.einsum("bhs,bsd->bhd", weights[:, :, 0].astype(q.dtype), v.astype(q.dtype))
    return (all_pairs * own).sum(1, keepdims=True), weights


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout: each element is 0 with probability ``rate``, else divided by 1 - ``rate``."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def causal_mask(key_mask: jax.Array, query_columns: jax.Array) -> jax.Array:
    """``[B, 1, T, S]``: key column s is open to a query in column t where s ≤ t and ``key_mask`` ``[B, S]`` is True."""
    columns: Any = jnp.arange(key_mask.shape[1], dtype=jnp.int32)
    return key_mask[:, None, None, :] & (columns[None, :] <= query_columns[:, None])[None, None]
