"""Prompt lookup: the row itself proposes how it goes on, by what followed its last n-gram before (Saxena 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.repetition import UNROLLED
from optjax.manual import as_after


def look_up(tokens: jax.Array, first: jax.Array, count: jax.Array, *, width: int, max_ngram: int) -> jax.Array:
    """A guess ``[B, width]`` at the next tokens of rows ``[B, S]`` that hold columns ``first`` to ``count`` ``[B]``.

    What followed the last place where the row's last n tokens stand, for the largest n ≤ ``max_ngram`` that stands
    anywhere. Where the row ends before the guess does, the guess goes on as if the text repeated itself. A row that
    never said its last token before gets any guess.
    """
    columns = jnp.arange(tokens.shape[1])
    # An n-gram that the row holds twice is shorter than the row.
    sizes = jnp.arange(1, 1 + min(max_ngram, tokens.shape[1] - 1), dtype=jnp.int32)

    def longer(carry, n):
        # Whether the n tokens before a column are the row's last n.
        before, matched, longest = carry
        before = jnp.roll(before, 1, axis=1)
        last = jnp.take_along_axis(tokens, jnp.maximum(count - n, 0)[:, None], axis=1)
        matched &= (before == last) & (columns - n >= first[:, None])
        return (before, matched, longest + matched.astype(jnp.int32)), None

    none = as_after(
        lambda carry: longer(carry, jnp.int32(1))[0],
        (tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)),
    )
    (_, _, longest), _ = jax.lax.scan(longer, none, sizes, unroll=max(1, min(len(sizes), UNROLLED)))
    known = (longest > 0) & (columns < count[:, None])
    best = jnp.argmax(jnp.where(known, longest * tokens.shape[1] + columns, -1), axis=1)
    period = jnp.maximum(count - best, 1)
    at = best[:, None] + jnp.arange(width) % period[:, None]
    return jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)
