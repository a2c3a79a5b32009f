"""AdamW (Loshchilov and Hutter 2019) over sharded weights, with moments in either dtype and either memory.

It is `optax.adamw` after `optax.clip_by_global_norm`, and tested equal to them; optax has no moments in bfloat16 with
stochastic rounding, nor any in the host's memory that come layer by layer, nor an update that leaves bits as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.params import Params

from .guard import Guard, loss_scale
from .optimizer import Recipe, decayed, learning_rate
from .options import StepOptions
from .placing import place, shardings


@partial(jax.tree_util.register_dataclass, data_fields=["first", "second"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Moments:
    """Running means of the gradient and of its square: two trees like the params."""

    first: Params
    second: Params


def init_moments(params: Params, options: StepOptions) -> Moments:
    """Zeros, each where its weight lies, or in the memory of that device's host."""

    def zeros() -> Params:
        one = partial(jnp.zeros_like, dtype=options.moments_dtype)
        if params.placement is None:
            # They stay where jax puts them: told where to lie they would make the first step another program.
            made = jax.tree.map(one, params)
        else:
            made = jax.tree.map(lambda weight, at: one(weight, device=at), params, shardings(params))
        return made if options.moments_memory == "device" else place(made, "host")

    return Moments(zeros(), zeros())


def update(
    recipe: Recipe,
    params: Params,
    gradients: Params,
    moments: Moments,
    step: jax.Array,
    options: StepOptions,
    *,
    guard: Guard,
    loss: jax.Array,
) -> tuple[Params, Moments, dict[str, jax.Array]]:
    """One update, the gradient clipped before it to a norm of ``recipe.clip_norm``.

    Decay is decoupled, and scaled by the learning rate, as in torch's AdamW. All is computed in float32. Where the loss
    or the norm is not finite, weights and moments stay the same bits.

    Args:
      gradients: of the loss times `loss_scale`.
      step: the number of finished steps; those that left out their update do not count where moments are unbiased.

    Returns:
      The new weights and moments, and ``grad_norm`` (before the gradient was clipped), ``lr`` and ``skipped``.
    """
    norm = jnp.sqrt(sum(jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(gradients)))
    norm = norm / loss_scale(guard, options) if options.scales_loss else norm
    clip = jnp.where(norm < recipe.clip_norm, 1.0, recipe.clip_norm / norm)
    clip = clip / loss_scale(guard, options) if options.scales_loss else clip
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    rate = learning_rate(recipe, step) * guard.lr_scale
    count = (step - guard.skipped + 1).astype(jnp.float32)
    unbias1, unbias2 = 1.0 - recipe.beta1**count, 1.0 - recipe.beta2**count
    decays = decayed(params.config, params.head, stacked=params.stacked).weights

    def one(key, weight, gradient, first, second, decays):
        gradient = gradient.astype(jnp.float32) * clip
        m = recipe.beta1 * first.astype(jnp.float32) + (1 - recipe.beta1) * gradient
        v = recipe.beta2 * second.astype(jnp.float32) + (1 - recipe.beta2) * jnp.square(gradient)
        change = (m / unbias1) / (jnp.sqrt(v / unbias2) + recipe.eps)
        if decays:
            change = change + recipe.weight_decay * weight
        new = weight - rate * change
        if first.dtype != jnp.float32:
            bits = jax.random.bits(key, weight.shape, jnp.uint32)
            m, v = round_at_random(m, bits & 0xFFFF), round_at_random(v, bits >> 16)
        return tuple(jnp.where(finite, after, before) for after, before in ((new, weight), (m, first), (v, second)))

    def each(key, decays, weights, gradients, first, second) -> tuple[Any, Any, Any]:
        """Three trees, from some of the weights and what belongs to them."""
        leaves, tree = jax.tree.flatten(weights)
        others = [jax.tree.leaves(other) for other in (gradients, first, second, decays)]
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        new = [one(*given) for given in zip(keys, leaves, *others, strict=True)]
        first, second, third = (jax.tree.unflatten(tree, column) for column in zip(*new, strict=True))
        return first, second, third

    # The noise is a function of weight and step, so that a run that resumes goes on with the same.
    key = jax.random.fold_in(jax.random.key(0), step)
    trees = [tree.weights for tree in (params, gradients, moments.first, moments.second)]
    if options.moments_memory == "host":
        new = _by_layers(each, key, decays, trees, params.stacked)
    else:
        new = each(key, decays, *trees)
    weights, first, second = (dataclasses.replace(params, weights=tree) for tree in new)
    memory = options.moments_memory
    metrics = {"grad_norm": norm, "lr": rate, "skipped": jnp.where(finite, 0, 1)}
    return place(weights), Moments(place(first, memory), place(second, memory)), metrics


def _by_layers(each, key, decays, trees: list[Any], stacked: bool) -> tuple[Any, Any, Any]:
    """``each``, with the moments of one layer on the device at a time; in place.

    Of a stack those of all vectors come first: a layer's would begin half way in a word, in bfloat16, and the TPU
    compiler takes no such part out of the host's memory.
    """
    outside = [{name: weight for name, weight in tree.items() if name != "layers"} for tree in trees]
    rest = {name: decay for name, decay in decays.items() if name != "layers"}
    done = _through_device(each, key, rest, *outside)
    key = jax.random.fold_in(key, len(jax.tree.leaves(rest)))
    weights, gradients, first, second = (tree["layers"] for tree in trees)
    if stacked:
        first, second = _move((first, second), jax.memory.Space.Device, lambda x: x.ndim == 2)
        count = jax.tree.leaves(weights)[0].shape[0]

        def step(i, carry):
            mine, its_gradients = jax.tree.map(partial(_take, i), (carry, gradients))
            given = decays["layers"], mine[0], its_gradients, mine[1], mine[2]
            new = _through_device(each, jax.random.fold_in(key, i), *given, which=lambda x: x.ndim > 1)
            return jax.tree.map(partial(_put, i), carry, new)

        layers = jax.lax.fori_loop(0, count, step, (weights, first, second))
    else:
        new = [
            _through_device(each, jax.random.fold_in(key, i), *given)
            for i, given in enumerate(zip(decays["layers"], weights, gradients, first, second, strict=True))
        ]
        layers = tuple(list(column) for column in zip(*new, strict=True))
    one, two, three = (tree | {"layers": layer} for tree, layer in zip(done, layers, strict=True))
    return one, two, three


def _through_device(each, key, decays, weights, gradients, first, second, which=lambda x: True) -> tuple[Any, Any, Any]:
    first, second = _move((first, second), jax.memory.Space.Device, which)
    new, first, second = each(key, decays, weights, gradients, first, second)
    first, second = _move((first, second), jax.memory.Space.Host, which)
    return new, first, second


def _move(trees: Any, space: Any, which: Callable[[jax.Array], bool]) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if which(x) else x, trees)


def _take(i, array: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)


def _put(i, array: jax.Array, one: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, one, i, 0)


def round_at_random(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16, up with a probability in proportion; ``noise`` is uint32 of 16 bits.

    Rounded to the nearest, a sum to which less than 1/512 of itself is added would not change at all.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)
