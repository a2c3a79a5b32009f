"""Attention over keys and values, in the layouts they come in. Scores and softmax in float32 whatever the dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optjax.attention_products import key_products, value_products
from optjax.cache_codes import Buffer, Codes

# Finite, so that a row with every key masked stays finite in every dtype (Hugging Face #17433).
MASKED = -1e30

# Up to this many queries of a row meet flat keys where they lie; for more, the keys of each head are gathered first.
FEW_QUERIES = 8

AttentionWeights = jax.Array


def attend(
    q: jax.Array,
    k: Buffer,
    v: Buffer,
    mask: jax.Array,
    *,
    layout: str,
    head_mask: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    groups: int = 1,
    on_cpu: bool = False,
    on_gpu: bool = False,
) -> tuple[jax.Array, AttentionWeights]:
    """Attention of T queries over S keys.

    Args:
      q: ``[B, T, H, K]``, already scaled by K^-0.5.
      k, v: ``[B, H, S, K]`` or, of one row, ``[H, S, K]`` (layout ``"heads"``), or ``[B, S, D]`` (``"flat"``); or
        `Codes`.
      mask: ``[B, 1, T, S]`` bool, True where a query may look.
      head_mask: ``[H]``; multiplies each head's weights after the softmax.
      dropout, dropout_key: of the attention weights.
      groups: the number of devices that the heads are split over.
      on_cpu, on_gpu: as XLA's CPU or GPU backend does it best; see attention_products.py.

    Returns:
      ``[B, T, D]``, and the weights ``[B, H, T, S]`` in float32 (dead code to the compiler where nobody asks for them).
    """

    def weigh(scores: jax.Array) -> jax.Array:
        return weights_of(scores, mask, head_mask, dropout, dropout_key)

    if layout == "heads":
        return attend_heads(q, k, v, weigh, on_cpu, on_gpu)
    return _attend_flat(q, k, v, weigh, groups, on_cpu)


def weights_of(scores, mask, head_mask, dropout, dropout_key, rows=None, columns: int | None = None) -> jax.Array:
    """Weights ``[B, H, T, S]`` from scores of the same shape: all of them, or these rows of the first columns."""
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    if dropout_key is not None and dropout > 0:
        rows = jnp.arange(scores.shape[2]) if rows is None else rows
        weights = _drop_weights(weights, dropout, dropout_key, rows, columns or scores.shape[3])
    if head_mask is not None:
        weights = weights * head_mask.astype(weights.dtype)[:, None, None]
    return weights


def attend_heads(
    q, k: Buffer, v: Buffer, weigh, on_cpu: bool = False, on_gpu: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`attend` in the layout ``"heads"``; ``weigh`` makes weights from scores ``[B, H, T, S]``."""
    b, t, h, d = q.shape
    # Without the batch dimension where k has none: see cache.py.
    scores = key_products(q.reshape(*k.shape[:-3], t, h, d), k, on_cpu, on_gpu)
    weights = weigh(scores.reshape(b, h, t, -1))
    out = value_products(weights.reshape(scores.shape), v, q.dtype, on_cpu)
    return out.reshape(b, t, h * d), weights


def by_heads(flat: Buffer, heads: int) -> Buffer:
    """Keys or values ``[B, S, D]`` as ``[B, H, S, K]``."""
    if isinstance(flat, Codes):
        return Codes(_by_heads(flat.codes, heads), flat.scales)
    return _by_heads(flat, heads)


def _by_heads(flat: jax.Array, heads: int) -> jax.Array:
    return flat.reshape(*flat.shape[:2], heads, -1).swapaxes(1, 2)


def _attend_flat(q, k: Buffer, v: Buffer, weigh, groups: int, on_cpu: bool) -> tuple[jax.Array, jax.Array]:
    b, t, h, d = q.shape
    if t > FEW_QUERIES:
        return attend_heads(q, by_heads(k, h), by_heads(v, h), weigh, on_cpu)
    # A token's query, or those of a few side by side: lay q out block-diagonally, so that the scores of all heads of a
    # device (n = H / G) are one matrix product with its flat keys (c = D / G). It multiplies n times more zeros, on a
    # unit that waits for memory anyway.
    n, c = h // groups, h * d // groups
    (k, k_scales), (v, v_scales) = _apart(k), _apart(v)
    k, v = (x.reshape(b, -1, groups, c).astype(q.dtype) for x in (k, v))
    own = jnp.repeat(jnp.eye(n, dtype=q.dtype), d, axis=1)  # [n, c]: the columns that are a head's own
    blocks = q.reshape(b, t, groups, c).transpose(0, 2, 3, 1)[:, :, :, None] * own.T[:, :, None]
    scores = jnp.einsum("bsgc,bgcm->bgms", k, blocks.reshape(b, groups, c, n * t), preferred_element_type=jnp.float32)
    weights = weigh(scores.reshape(b, h, t, -1) * k_scales)
    per_head = (weights * v_scales).astype(q.dtype).reshape(scores.shape)
    all_pairs = jnp.einsum("bgms,bsgc->bgmc", per_head, v).reshape(b, groups, n, t, c)
    return (all_pairs * own[:, None]).sum(2).swapaxes(1, 2).reshape(b, t, h * d), weights


def _apart(flat: Buffer) -> tuple[jax.Array, jax.Array | float]:
    """Keys or values ``[B, S, D]``, and what scores or weights ``[B, H, T, S]`` are to be multiplied by."""
    return (flat.codes, flat.scales[:, :, None]) if isinstance(flat, Codes) else (flat, 1.0)


def _drop_weights(weights: jax.Array, rate: float, key: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
    """`drop` of rows ``[T]`` of the weights; each has its own key, so that blocks drop what the whole would."""
    b, h, _, s = weights.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, (b, h, columns)))(keys)
    return jnp.where(jnp.moveaxis(keep, 0, 2)[..., :s], weights / (1.0 - rate), 0.0)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout: each element is 0 with probability ``rate``, else divided by 1 - ``rate``."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def causal_mask(key_mask: jax.Array, query_columns: jax.Array) -> jax.Array:
    """``[B, 1, T, S]``: key column s is open to a query in column t where s ≤ t and ``key_mask`` ``[B, S]`` is True.

    Query columns are ``[T]``, or ``[B, T]`` where they differ by row.
    """
    columns: Any = jnp.arange(key_mask.shape[1], dtype=jnp.int32)
    past = columns <= query_columns[..., None]
    return key_mask[:, None, None, :] & (past[:, None] if past.ndim == 3 else past[None, None])
