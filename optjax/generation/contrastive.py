"""Contrastive search (Su et al. 2022, A Contrastive Framework for Neural Text Generation).

Of the k most probable tokens the one is taken that is probable and yet unlike what was said: each is read once, and its
hidden state compared with those of all tokens before it. The k candidates of a row are k queries of it, each of which
sees the row and itself; they write k columns to the cache, of which the chosen one's stays. The cache is never copied.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.cache import Cache, keep_one_column
from optjax.generation.history import NEVER, History
from optjax.generation.search import Contrastive
from optjax.heads import lm_logits
from optjax.model import Inputs, decoder
from optjax.params import Params


@partial(jax.tree_util.register_dataclass, data_fields=["logits", "context"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Ahead:
    """What contrastive search knows after a token that it has read already.

    Attributes:
      logits: ``[B, V]`` float32, the next token's.
      context: ``[B, S, E]`` float32, the last hidden states of all tokens in the history's columns, each of length 1.
    """

    logits: jax.Array
    context: jax.Array


def new_context(hidden: jax.Array, room: int) -> jax.Array:
    """The context of prompts with last hidden states ``[B, T, E]``, with room for more."""
    return jnp.pad(_directions(hidden), ((0, 0), (0, room), (0, 0)))


def look_ahead(
    params: Params,
    search: Contrastive,
    cache: Cache,
    history: History,
    context: jax.Array,
    scores: jax.Array,
    attn_implementation: str,
) -> tuple[jax.Array, Cache, Ahead]:
    """The next token ``[B]`` by processed scores ``[B, V]``, the cache with it, and what comes after it."""
    probability, ids = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), search.candidates)
    b, k = ids.shape
    position = jnp.broadcast_to((history.count - history.first)[:, None], (b, k))
    visible = _visible(cache, k)
    with jax.named_scope("decode"):
        how: Any = {"visible": visible, "cache": cache, "attn_implementation": attn_implementation}
        out = decoder(params, Inputs(ids=ids, position_ids=position, **how))
    assert out.cache is not None  # the decoder returns one where it was given one
    hidden = out.last_hidden_state
    likeness = jnp.einsum("bke,bse->bks", _directions(hidden), context, preferred_element_type=jnp.float32)
    said = (visible[:, :1] & (jnp.arange(cache.max_length) < history.count))[:, :, : context.shape[1]]
    # The cache may have fewer columns as yet: see stages.py.
    said = jnp.pad(said, ((0, 0), (0, 0), (0, context.shape[1] - said.shape[2])))
    degeneration = jnp.where(said, likeness, -jnp.inf).max(-1)
    value = (1 - search.penalty_alpha) * probability - search.penalty_alpha * degeneration
    # What may not come has no probability, and may be the most unlike.
    chosen = jnp.argmax(jnp.where(jnp.take_along_axis(scores, ids, axis=-1) == NEVER, -jnp.inf, value), axis=-1)
    rows = jnp.arange(b)
    token, hidden = ids[rows, chosen], hidden[rows, chosen]
    context = jax.lax.dynamic_update_slice_in_dim(context, _directions(hidden)[:, None], history.count, axis=1)
    return token, keep_one_column(out.cache, chosen, k), Ahead(lm_logits(params, hidden), context)


def _visible(cache: Cache, k: int) -> jax.Array:
    """The columns ``[B, k, S]`` that candidates attend to: the row's, and their own of the k that follow."""
    column = jnp.arange(cache.max_length)
    said = cache.mask & (column < cache.index)
    return said[:, None] | (column == cache.index + jnp.arange(k)[:, None])[None]


def _directions(hidden: jax.Array) -> jax.Array:
    """Hidden states ``[…, E]`` in float32, each divided by its length."""
    x = hidden.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True))
