"""Cross-entropy of the language model's head that never holds the logits of all tokens, forward or backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.declaration import logical_axes
from optjax.heads import IGNORE_INDEX
from optjax.lora.weight import AdaptedWeight
from optjax.params import Params
from optjax.placed import cast, constrain, gather, in_parts, parts, platform
from optjax.quantization.weight import QuantizedWeight

from .options import StepOptions


def summed_loss(params: Params, x: jax.Array, labels: jax.Array, scale: jax.Array, options: StepOptions) -> jax.Array:
    """The sum over all tokens of their negative log-likelihoods, times ``scale``: a float32 scalar.

    Differentiable in the params and x, not in scale. The gradient is made together with the loss, chunk by chunk; that
    of the head's table is summed in float32.

    Args:
      x: last hidden states ``[B, T, E]``, in the dtype to compute in.
      labels: ``[B, T]``; -100 is left out.

    Raises:
      ValueError: T does not divide into ``options.loss_chunks``.
    """
    config, placement = params.config, params.placement
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    rows, length, vocab = x.shape[0], x.shape[1], config.vocab_size
    if placement is not None:
        # Chunks are interleaved (every n-th token), so that a device that has a part of a row has its part of each.
        length //= placement.shards("length")
        rows, vocab = rows / placement.shards("batch"), vocab / placement.shards("vocab")
    chunks = options.chunks_of_loss(length, 4 * rows * vocab, platform(placement))
    axes = logical_axes(config, params.head)[name]["weight"]
    labels = constrain(placement, labels.astype(jnp.int32), "batch", "length")
    table = params[name]["weight"]
    if isinstance(table, QuantizedWeight | AdaptedWeight):  # every chunk needs it whole
        table = table.dequantize(x.dtype) if isinstance(table, QuantizedWeight) else table.whole(x.dtype)
        table = table if placement is None else jax.lax.with_sharding_constraint(table, placement.sharding(axes))
    return _summed_loss(table, x, labels, scale, placement, axes, chunks)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _summed_loss(table, x, labels, scale, placement: Any, axes, chunks: int) -> jax.Array:
    used = _as_used(table, x.dtype, placement, axes)

    def add(total, part):
        nll, _, _ = _chunk(used, part[0], part[1], placement)
        return total + nll, jnp.zeros(())

    total, _ = _over_chunks(add, _no_loss(labels, chunks), x, labels, chunks)
    return total.sum() * scale


def _with_gradients(table, x, labels, scale, placement, axes, chunks):
    trained = table.perturbed  # a frozen table gets no gradient, whose sum would take its memory
    table, x, labels, scale = (each.value for each in (table, x, labels, scale))
    used, on_cpu = _as_used(table, x.dtype, placement, axes), _on_cpu(placement)

    def add(carry, part):
        total, sums = carry
        nll, d_logits, x = _chunk(used, part[0], part[1], placement)
        d_logits = (d_logits * scale).astype(x.dtype)
        dx = jnp.einsum("btv,ve->bte", d_logits, used, preferred_element_type=x.dtype)
        dx = constrain(placement, dx, "batch", "residual_length", None)
        if not trained:
            return (total + nll, sums), dx
        # Each part of the tokens has a sum of its own: else every chunk would be summed over all devices.
        d_logits, x = (in_parts(placement, y) for y in (d_logits, x))
        if on_cpu:
            # In the other order XLA's CPU backend would write out the transpose of the logits' gradients first.
            more = jnp.einsum("pbqte,pbqtv->pqev", x, d_logits, preferred_element_type=jnp.float32)
            return (total + nll, sums + more), dx
        more = jnp.einsum("pbqtv,pbqte->pqve", d_logits, x, preferred_element_type=jnp.float32)
        return (total + nll, constrain(placement, sums + more, "batch", "length", "vocab", None)), dx

    b, t, e = x.shape
    places = parts(placement, b, "batch"), parts(placement, t // chunks, "length")
    shape = table.shape[::-1] if on_cpu else table.shape
    sums = jnp.zeros((*places, *shape), jnp.float32) if trained else None
    (total, sums), dx = _over_chunks(add, (_no_loss(labels, chunks), sums), x, labels, chunks)
    dx = constrain(placement, jnp.moveaxis(dx, 0, 2).reshape(b, t, e), "batch", "residual_length", None)
    if not trained:
        return total.sum() * scale, (None, dx)
    sums = sums.swapaxes(-1, -2) if on_cpu else sums
    d_table = sums[0, 0] if placement is None else placement.total(sums, axes)
    # Left to itself the compiler keeps every device's whole sum until the layers are done.
    return total.sum() * scale, jax.lax.optimization_barrier((d_table.astype(table.dtype), dx))


def _scaled(placement, axes, chunks, gradients, cotangent):
    d_table, dx = gradients
    d_table = None if d_table is None else d_table * cotangent.astype(d_table.dtype)
    return d_table, dx * cotangent.astype(dx.dtype), None, None


_summed_loss.defvjp(_with_gradients, _scaled, symbolic_zeros=True)


def _chunk(used, x, labels, placement):
    """Of some tokens: losses ``[B, t]``, their gradients by the logits ``[B, t, V]``, in float32; x, gathered."""
    with jax.named_scope("lm_head"):
        x = constrain(placement, x, "batch", "length", None)
        if _on_cpu(placement):
            # Else XLA would take the transpose that project_out ends with, of few tokens, into this product, and fail
            # in bfloat16.
            x = jax.lax.optimization_barrier(x)
        logits = jnp.einsum("bte,ve->btv", x, used, preferred_element_type=jnp.float32)
        logits = constrain(placement, logits, "batch", "length", "vocab")
        kept = labels != IGNORE_INDEX
        # Compared rather than looked up, but on a CPU alone: each device compares its own part of the vocabulary.
        is_label = jnp.arange(logits.shape[-1], dtype=labels.dtype) == labels[..., None]
        norm = jax.nn.logsumexp(logits, axis=-1)
        if _on_cpu(placement):
            picked = jnp.take_along_axis(logits, jnp.where(kept, labels, 0)[..., None], axis=-1)[..., 0]
        else:
            picked = jnp.where(is_label, logits, 0.0).sum(-1)
        nll = jnp.where(kept, norm - picked, 0.0)
        d_logits = jnp.exp(logits - norm[..., None]) - is_label.astype(jnp.float32)
        d_logits = jnp.where(kept[..., None], d_logits, 0.0)
        return nll, d_logits, x


def _on_cpu(placement) -> bool:
    return platform(placement) == "cpu" and (placement is None or placement.mesh.size == 1)


def _no_loss(labels, chunks: int) -> jax.Array:
    """Of the tokens of a chunk; not a scalar, which every chunk would sum over all devices."""
    b, t = labels.shape
    return jnp.zeros((b, t // chunks), jnp.float32)


def _over_chunks(add, start, x, labels, chunks: int) -> tuple[Any, jax.Array]:
    """`jax.lax.scan` over chunks: every n-th token of each row."""
    b, t, e = x.shape
    if chunks == 1:
        carry, out = add(start, (x, labels))
        return carry, out[None]
    pieces = jnp.moveaxis(x.reshape(b, t // chunks, chunks, e), 2, 0)
    return jax.lax.scan(add, start, (pieces, jnp.moveaxis(labels.reshape(b, t // chunks, chunks), 2, 0)))


def _as_used(table, dtype, placement, axes) -> jax.Array:
    return gather(placement, cast(table, dtype), axes)
