"""Loss and gradients of a batch, with one copy of the gradients however many micro-batches and layers there are.

`jax.grad` of a scan over layers makes a whole gradient for each micro-batch, to be added to the sum. Here the loops
over layers are written out, forward and backward: the backward one takes the `jax.vjp` of one layer at a time and adds
what it gives to that layer's slice of the sum, in place. At any time there exist the weights, the sum, what
`StepOptions.remat` keeps of every layer, and one layer's gathered weights and gradients.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from optjax.attention import causal_mask
from optjax.kernels.flash import Flash
from optjax.layer import USED_WEIGHT, decoder_layer
from optjax.lora.weight import check_not_adapted
from optjax.model import Inputs, embed
from optjax.offloading import check_not_offloaded
from optjax.params import Params
from optjax.placed import constrain, platform

from .batches import Batch, positions, seen
from .head_loss import head_loss, loss_scales
from .options import StepOptions
from .placing import in_micro_batches, place

Weights = dict[str, Any]


def check_not_quantized(params: Params) -> None:
    """ValueError for quantized params, whose codes have no gradient, for offloaded ones and for those with adapters."""
    check_not_offloaded(params, "they do not train")
    check_not_adapted(params, "train by themselves: adapter_step")
    if params.quantization is not None:
        raise ValueError(
            f"these params are quantized to {params.quantization.kind}, and codes do not train: "
            "load them without quantization, or optjax.dequantize them"
        )


def loss_and_gradients(
    params: Params,
    batch: Batch,
    dropout_key: jax.Array | None,
    options: StepOptions,
    loss_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, Params]:
    """The mean loss of a batch (see `check_arrays`), by the head of the params, and its gradients in float32.

    Of a language model it is the mean negative log-likelihood in nats per token. Micro-batch m of M takes rows m,
    m + M, m + 2M, …: every device its own. Its dropout key is ``fold_in(dropout_key, m)``.

    Args:
      loss_scale: the gradients are those of the loss times this.

    Raises:
      ValueError: the params are quantized.
    """
    check_not_quantized(params)
    m = options.micro_batches
    scale = loss_scales(params, batch) * loss_scale
    add = partial(_add_stacked if params.stacked else _add_unrolled, params, scale, options)
    start = jnp.zeros((), jnp.float32), place(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params))
    if m == 1:
        loss, gradients = add(start, (dict(batch), _fold_in(dropout_key, 0)))
        return loss / loss_scale, gradients

    def step(carry, each):
        part, i = each
        return add(carry, (part, _fold_in(dropout_key, i))), None

    (loss, gradients), _ = jax.lax.scan(step, start, (in_micro_batches(batch, params, m), jnp.arange(m)))
    return loss / loss_scale, gradients


def batch_loss(
    params: Params, batch: Batch, scale: jax.Array, dropout_key: jax.Array | None, options: StepOptions
) -> jax.Array:
    """The loss of a batch, or of a part of one, times what `loss_scales` says of the whole; for `jax.grad`."""
    x = _embed(params, batch, options)
    layer, layers, own = _layer(params, options), params.config.num_hidden_layers, seen(batch)
    if params.stacked:

        def step(x, each):
            weights, i = each
            # Each by itself: else what is frozen would have a gradient where an adapter beside it has one.
            weights = jax.tree.map(jax.lax.optimization_barrier, weights)
            return layer(weights, own, x, _fold_in(dropout_key, i)), None

        x, _ = jax.lax.scan(step, x, (params["layers"], jnp.arange(layers)))
    else:
        for i in range(layers):
            x = layer(params.layer(i), own, x, _fold_in(dropout_key, i))
    return head_loss(params, x, batch, scale, options)


def _add_unrolled(params: Params, scale, options: StepOptions, carry, each):
    """Loss and gradients of one micro-batch, added to those before it: layers in a list, by plain autodiff."""
    batch, key = each
    loss, gradients = jax.value_and_grad(batch_loss)(params, batch, scale, key, options)
    return carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradients)


def _add_stacked(params: Params, scale, options: StepOptions, carry, each):
    """The same of stacked layers, in place."""
    (total, sums), (batch, key) = carry, each
    outside = {name: weights for name, weights in params.weights.items() if name != "layers"}

    def with_outside(outside: Weights) -> Params:
        return dataclasses.replace(params, weights=outside | {"layers": {}})

    x, from_embed = jax.vjp(lambda outside: _embed(with_outside(outside), batch, options), outside)
    x, kept = _forward(params, x, seen(batch), key, options)

    def head(outside, x):
        return head_loss(with_outside(outside), x, batch, scale, options)

    loss, from_head = jax.vjp(head, outside, x)
    d_outside, dx = from_head(jnp.ones((), jnp.float32))
    sums_outside = {name: weights for name, weights in sums.weights.items() if name != "layers"}
    sums_outside = jax.tree.map(jnp.add, sums_outside, d_outside)
    dx, sums_layers = _backward(params, kept, dx, sums["layers"], seen(batch), key, options)
    sums_outside = jax.tree.map(jnp.add, sums_outside, from_embed(dx)[0])
    return total + loss, dataclasses.replace(sums, weights=sums_outside | {"layers": sums_layers})


def _forward(params: Params, x: jax.Array, own, key, options: StepOptions):
    """The layers over x; and what they keep, stacked ``[L, …]``, as `_backward` takes it."""
    layer = _layer(params, options)
    kept_of: list[_Kept] = []

    def step(x, each):
        weights, i = each
        weights = jax.lax.optimization_barrier(weights)
        given = weights, own, _fold_in(key, i)
        y, vjp = jax.vjp(lambda weights, own, key, x: layer(weights, own, x, key), *given, x)
        kept = _Kept(vjp, given)
        kept_of[:] = [kept]
        return y, _to(jax.memory.Space.Host, kept.arrays) if options.remat == "offload" else kept.arrays

    x, arrays = jax.lax.scan(step, x, (params["layers"], jnp.arange(params.config.num_hidden_layers)))
    return x, (kept_of[0], arrays)


def _backward(params: Params, kept, dx: jax.Array, sums: Weights, own, key, options: StepOptions):
    """The gradient by what `_forward` was given, and the sums with the gradients by the layers' weights added."""
    structure, arrays = kept

    def step(carry, each):
        dx, sums = carry
        weights, i, arrays = each
        # Else the compiler casts, or lays out anew, all layers' weights before the loop: a second copy of them.
        weights = jax.lax.optimization_barrier(weights)
        if options.remat == "offload":
            arrays = _to(jax.memory.Space.Device, arrays)
        d_weights, _, _, dx = structure.vjp((weights, own, _fold_in(key, i)), arrays)(dx)
        dx = constrain(params.placement, dx, "batch", "residual_length", None)
        return (dx, jax.tree.map(partial(_add_at, i), sums, d_weights)), None

    layers = jnp.arange(params.config.num_hidden_layers)
    (dx, sums), _ = jax.lax.scan(step, (dx, sums), (params["layers"], layers, arrays), reverse=True)
    return dx, sums


class _Kept:
    """What a `jax.vjp` needs of its forward pass: ``arrays``, without what the backward pass is given anyway."""

    def __init__(self, vjp: Any, given: Any):
        leaves, self._tree = jax.tree.flatten(vjp)
        ids = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(given))}
        self._given = [ids.get(id(leaf)) for leaf in leaves]
        self.arrays = [leaf for leaf, i in zip(leaves, self._given, strict=True) if i is None]

    def vjp(self, given: Any, arrays: list[jax.Array]) -> Any:
        """The vjp, from the same of what was given and what was kept."""
        again, kept = jax.tree.leaves(given), iter(arrays)
        return jax.tree.unflatten(self._tree, [next(kept) if i is None else again[i] for i in self._given])


def _layer(params: Params, options: StepOptions):
    """A decoder layer that keeps for its backward pass what ``options.remat`` says: weights, `seen`, x, key → y."""
    config, placement = params.config, params.placement

    def layer(weights: Weights, own: dict[str, jax.Array], x: jax.Array, key) -> jax.Array:
        b, t = x.shape[:2]
        mask, segments = (own.get(name) for name in ("attention_mask", "segment_ids"))
        real = None if mask is None else mask != 0
        visible = causal_mask(jnp.ones((1, t), bool) if real is None else real, jnp.arange(t, dtype=jnp.int32))
        if segments is not None:
            visible &= segments[:, None, :, None] == segments[:, None, None, :]
        if own:
            visible = checkpoint_name(visible, USED_WEIGHT)  # made again rather than kept
        if options.attention_kind(params, (b, t)) == "flash":
            kind: Any = {"flash": Flash(placement, real, segments=segments)}
        else:
            kind = {"query_block": options.block_of_queries(t, platform(placement))}
        y, _, _ = decoder_layer(config, placement, weights, x, visible, None, key, None, **kind)
        return constrain(placement, y, "batch", "residual_length", None)

    if options.remat == "none" and placement is None and platform(placement) == "cpu":
        return layer  # all is kept, as nothing is gathered; `jax.checkpoint` would pass over all of it once more

    policies = jax.checkpoint_policies
    policy = {
        "none": policies.save_anything_except_these_names(USED_WEIGHT),
        "dots": policies.dots_with_no_batch_dims_saveable,
    }.get(options.remat, policies.nothing_saveable)
    return jax.checkpoint(layer, policy=policy, prevent_cse=not params.stacked)


def _embed(params: Params, batch: Batch, options: StepOptions) -> jax.Array:
    """What goes into the first layer."""
    # Positions of one row, where all have the same: the table's gradient is then a sum over rows, no scatter of B·T.
    inputs = Inputs(ids=batch["input_ids"], position_ids=positions(batch))
    x = embed(params, inputs, options.dtype).astype(options.dtype)
    return constrain(params.placement, x, "batch", "residual_length", None)


def _fold_in(key, i):
    return None if key is None else jax.random.fold_in(key, i)


def _add_at(i, total: jax.Array, one: jax.Array) -> jax.Array:
    """``total`` ``[L, …]`` with ``one`` added to its i-th slice."""
    one = jax.lax.dynamic_index_in_dim(total, i, keepdims=False) + one
    return jax.lax.dynamic_update_index_in_dim(total, one, i, 0)


def _to(memory: Any, arrays: list[jax.Array]) -> list[jax.Array]:
    return [jax.device_put(array, memory) for array in arrays]
