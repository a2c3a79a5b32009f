"""Training of adapters beside frozen weights: LoRA, and over quantized weights QLoRA (Dettmers et al. 2023).

The frozen base is an argument of the step and no part of the state: no gradient of it is made, no moments are kept, and
a checkpoint holds the adapters and their moments alone.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optjax.lora.adapters import init_adapters
from optjax.lora.apply import with_adapters
from optjax.lora.config import LoraConfig
from optjax.lora.layout import place_adapters, shardings_of
from optjax.lora.parts import LOW_RANK, Adapters
from optjax.lora.weight import check_not_adapted
from optjax.model import with_outer_dropout
from optjax.offloading import check_not_offloaded
from optjax.params import Params
from optjax.sharding.overlap import compile_overlapped

from .backward import batch_loss
from .batches import Batch, check_arrays
from .guard import Guard, after_step, init_guard, loss_scale
from .head_loss import loss_scales
from .optimizer import Recipe, learning_rate
from .options import PLAIN, StepOptions
from .placing import everywhere, in_micro_batches
from .state import check_batch


@partial(jax.tree_util.register_dataclass, data_fields=["adapters", "moments", "step", "guard"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AdapterState:
    """A pytree: adapters, optax's state for them, the number of finished steps (int32 scalar), and the `Guard`."""

    adapters: Adapters
    moments: optax.OptState
    step: jax.Array
    guard: Guard


def init_adapter_state(adapters: Adapters, options: StepOptions = PLAIN) -> AdapterState:
    """A state before its first step; moments lie where their adapters do.

    Args:
      adapters: of `init_adapters`, for the base that is then given to `adapter_step`; or loaded, to be trained on, and
        then laid out by ``optjax.place_adapters(adapters, base)``.

    Raises:
      ValueError: adapters that are not float32, in which small updates do not vanish; options that are not for
        adapters.
    """
    _check_options(options)
    leaves = jax.tree.leaves(adapters)
    dtypes = {str(leaf.dtype) for leaf in leaves}
    if dtypes != {"float32"}:
        raise ValueError(f"adapters are trained in float32, these are {', '.join(sorted(dtypes))}")
    moments: Any = optimizer(_ANY, adapters).init(_as_tree(adapters))
    lies, scalar = leaves[0].sharding, None
    if isinstance(lies, NamedSharding):
        scalar = NamedSharding(lies.mesh, PartitionSpec())
        lie = _like_adapters(moments, jax.tree.map(lambda leaf: leaf.sharding, adapters), scalar)
        moments = jax.tree.map(jax.device_put, moments, lie)
    return AdapterState(adapters, moments, jnp.zeros((), jnp.int32, device=scalar), init_guard(options, scalar))


def abstract_adapter_state(base: Params, config: LoraConfig, options: StepOptions = PLAIN) -> AdapterState:
    """The state of `init_adapters` as ``jax.ShapeDtypeStruct`` with shardings: for restoring. Reads no leaf.

    Raises:
      ValueError: as `init_adapters` and `init_adapter_state`.
    """

    def made(base: Params, key: jax.Array) -> AdapterState:
        adapters = init_adapters(base, config, key)
        moments = optimizer(_ANY, adapters).init(_as_tree(adapters))
        return AdapterState(adapters, moments, jnp.zeros((), jnp.int32), init_guard(options))

    _check_base(base)
    _check_options(options)
    shapes: Any = jax.eval_shape(made, base, jax.random.key(0))
    scalar, lie = everywhere(base), _lie(shapes.adapters, base)
    shardings: Any = AdapterState(
        lie,
        _like_adapters(shapes.moments, lie, scalar),
        scalar,
        jax.tree.map(lambda _: scalar, shapes.guard),
    )
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def optimizer(recipe: Recipe, adapters: Adapters) -> optax.GradientTransformation:
    """AdamW after clipping, as of the recipe but for the learning rate, which the step multiplies by.

    Matrices decay, those of the head included; biases and norms do not.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        *module, name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return name in LOW_RANK or (name == "weight" and not module[-1].endswith("layer_norm"))

    mask = jax.tree_util.tree_map_with_path(decays, adapters)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.eps),
        optax.add_decayed_weights(recipe.weight_decay, mask),
    )


@partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def adapter_step(
    state: AdapterState, base: Params, batch: Batch, recipe: Recipe, seed: int = 0, options: StepOptions = PLAIN
) -> tuple[AdapterState, dict[str, jax.Array]]:
    """One update of the adapters on a batch (see `check_arrays`), by the loss of the base's head. The old state's
    buffers are given up to the new one.

    ``seed`` matters where there is dropout, the model's or ``lora_dropout``: masks are a function of seed and step, and
    of ``options.micro_batches``. Where the loss or a gradient is not finite, adapters and moments stay as they are, bit
    for bit, and the step counts all the same.

    Args:
      base: the frozen params: in any floating dtype or quantized, stacked or not, on a mesh or not.

    Returns:
      The new state, and the scalars of `train_step`.

    Raises:
      ValueError: as `train_step`; adapters of another model; a base with adapters or offloaded layers.
    """
    _check_base(base)
    _check_options(options)
    check_batch(base, *check_arrays(base, batch), options)
    if "layers" in state.adapters.weights and state.adapters.stacked != base.stacked:
        raise ValueError(
            "adapters have their layers stacked and the base has not, or the other way round: begin with "
            "optjax.place_adapters(adapters, base)"
        )
    config, guard = base.config, state.guard
    rates = config.dropout, config.attention_dropout, config.layerdrop, state.adapters.config.lora_dropout
    key = jax.random.fold_in(jax.random.key(seed), state.step) if any(rate > 0 for rate in rates) else None
    scale = loss_scale(guard, options)
    loss, gradients = loss_and_adapter_gradients(state.adapters, base, batch, key, options, scale)
    gradients = jax.tree.map(lambda g: g / scale, gradients) if options.scales_loss else gradients
    norm = optax.tree.norm(_as_tree(gradients))
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    rate = learning_rate(recipe, state.step) * guard.lr_scale
    transform = optimizer(recipe, state.adapters)
    changes, moments = transform.update(_as_tree(gradients), state.moments, _as_tree(state.adapters))
    adapters: Any = jax.tree.map(lambda weight, change: weight - rate * change, state.adapters, changes)
    adapters, moments = jax.tree.map(
        lambda after, before: jnp.where(finite, after, before), (adapters, moments), (state.adapters, state.moments)
    )
    if base.placement is not None:
        lie = _like_adapters(moments, _lie(adapters, base), everywhere(base))
        moments = jax.tree.map(jax.lax.with_sharding_constraint, moments, lie)
    new = AdapterState(place_adapters(adapters, base), moments, state.step + 1, after_step(guard, finite, options))
    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    metrics = {"loss": loss, "grad_norm": norm, "lr": rate, "skipped": skipped, "loss_scale": jnp.float32(scale)}
    return new, metrics


def loss_and_adapter_gradients(
    adapters: Adapters,
    base: Params,
    batch: Batch,
    dropout_key: jax.Array | None,
    options: StepOptions,
    loss_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, Adapters]:
    """`loss_and_gradients`, by the adapters alone; the gradients are those of the loss times ``loss_scale``."""
    m, scale = options.micro_batches, loss_scales(base, batch) * loss_scale

    def loss(adapters: Adapters, part: Batch, key: jax.Array | None) -> jax.Array:
        params = with_outer_dropout(with_adapters(base, adapters), key)
        return batch_loss(params, part, scale, key, options)

    def add(carry: Any, part: Batch, i: Any) -> Any:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(adapters, part, key))

    start = jnp.zeros((), jnp.float32), place_adapters(jax.tree.map(jnp.zeros_like, adapters), base)
    if m == 1:
        total, gradients = add(start, dict(batch), 0)
        return total / loss_scale, place_adapters(gradients, base)

    parts = in_micro_batches(batch, base, m), jnp.arange(m)
    (total, gradients), _ = jax.lax.scan(lambda carry, each: (add(carry, *each), None), start, parts)
    return total / loss_scale, place_adapters(gradients, base)


def compile_adapter_step(
    state: AdapterState, base: Params, batch: Batch, recipe: Recipe, seed: int = 0, options: StepOptions = PLAIN
) -> jax.stages.Compiled:
    """`adapter_step` compiled for arrays like these, with `optjax.sharding.overlap_options`.

    Raises:
      ValueError: as `adapter_step`.
    """
    lowered = adapter_step.lower(state, base, batch, recipe, seed, options)
    return compile_overlapped(lowered, None if base.placement is None else base.placement.mesh)


# The optimizer's state has the same shape whatever the recipe.
_ANY = Recipe(peak_lr=1.0, total_steps=1, warmup_steps=0)


def _check_base(base: Params) -> None:
    check_not_offloaded(base, "nothing is trained beside them")
    check_not_adapted(base, "are the state's, not the base's")


def _check_options(options: StepOptions) -> None:
    """ValueError for levers that an adapter's step does not have."""
    if options.remat == "offload":
        raise ValueError("remat 'offload' is of train_step; beside frozen weights take 'full'")
    if (options.moments_dtype, options.moments_memory) != ("float32", "device"):
        raise ValueError("the moments of adapters are small: they are float32 and on the device; leave moments_… out")


def _lie(adapters: Adapters, base: Params) -> Any:
    """The sharding of every adapter."""
    if base.placement is None:
        return jax.tree.map(lambda _: everywhere(base), adapters)
    return shardings_of(adapters, base)


def _like_adapters(tree: Any, adapters: Any, scalar: Any) -> Any:
    """``tree`` with ``adapters`` in place of each tree like them in it, and ``scalar`` in place of all else."""

    def one(node: Any) -> Any:
        return adapters if isinstance(node, Adapters) else scalar

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Adapters))


def _as_tree(adapters: Adapters) -> Any:
    """What optax takes, any pytree, in the words of its annotations."""
    return adapters
