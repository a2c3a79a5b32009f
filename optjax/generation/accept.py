"""Which guesses of a round stand, and the token after them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optjax.generation.draw import draw, most_probable


def accept_greedy(scores: jax.Array, guesses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens ``[B, γ + 1]``, of which those before the first wrong guess count, and how many ``[B]`` guesses stand.

    Args:
      scores: ``[B, γ + 1, V]``, after the last token and after each guess.
      guesses: ``[B, γ]``.
    """
    b, n, v = scores.shape
    tokens = most_probable(scores.reshape(b * n, v)).reshape(b, n)
    return tokens, _leading(tokens[:, :-1] == guesses)


def accept_draws(
    accept_keys: jax.Array, draw_keys: jax.Array, scores: jax.Array, guesses: jax.Array, q: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """As `accept_greedy`, for guesses drawn from ``q`` ``[B, γ, V]``; None: each guess was certain.

    The keys are ``[B]``, of the guesses that stand and of the token after them.
    """
    p = jax.nn.softmax(scores, axis=-1)
    q = jax.nn.one_hot(guesses, scores.shape[-1], dtype=p.dtype) if q is None else q
    of_p, of_q = (jnp.take_along_axis(x, guesses[:, :, None], axis=2)[:, :, 0] for x in (p[:, :-1], q))
    u = jax.vmap(lambda key: jax.random.uniform(key, guesses.shape[1:], jnp.float32))(accept_keys)
    stand = _leading(u * of_q < of_p)
    # After the last guess nothing was proposed: all of p is left.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p, q = (jnp.take_along_axis(x, stand[:, None, None], axis=1)[:, 0] for x in (p, q))
    rest = jnp.maximum(p - q, 0.0)
    # Nothing is left where p is q but for rounding, and then no guess is refused but by that.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
    token = draw(draw_keys, jnp.log(rest))
    tokens = jnp.pad(guesses, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(tokens.shape[1]) == stand[:, None], token[:, None], tokens), stand


def _leading(right: jax.Array) -> jax.Array:
    """How many of each row ``[B, γ]`` are True before the first that is not."""
    return jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
