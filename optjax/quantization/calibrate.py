"""`gptq`: a model's matrices rounded one after another, each for the inputs that it gets from those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optjax.attention import causal_mask
from optjax.attention_blocks import block_of_queries
from optjax.config import OPTConfig
from optjax.declaration import Weight, declare
from optjax.layer import decoder_layer
from optjax.model import Inputs, embed, finish
from optjax.params import Params, stack_layers
from optjax.progress import progress_bar
from optjax.quantization.codes import scales_of
from optjax.quantization.gptq import compensate
from optjax.quantization.observed import Observed
from optjax.quantization.quantize import Quantization, check_placement, check_quantizable, is_table, quantize_weight
from optjax.validate import as_count, as_ids, as_mask, check_positions

if TYPE_CHECKING:
    from optjax.sharding import Placement

# The matrices of a layer as its pass comes to them; those of a stage have the same inputs.
STAGES = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))
# A part of a model: what it makes of its weights, its inputs and their mask.
Part = Callable[["_Model", Any, jax.Array, jax.Array], jax.Array]


def gptq(
    params: Params,
    ids: Any,
    quantization: str | Quantization = "int4",
    *,
    attention_mask: Any = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Params:
    """`quantize` with a text to go by: in 4 bits about half the error, in the same format and at the same speed.

    GPTQ (Frantar et al. 2022, section 3): each matrix is rounded column by column, and the columns still to come make
    good what that changes in its outputs, for the inputs that the text brings. A layer's inputs are what the quantized
    ones before it give. What is quantized, and with which scales, is as `quantize` has it; the paper's 3 bits are not
    offered.

    Args:
      params: stacked or not, on a mesh or not. Layers are taken up one at a time, so leaves may be whatever reads
        itself from a file when it is made an array.
      ids: ``[N, T]`` int, text of the kind that the model will read. The paper takes 128 windows of 2048 tokens. The
        hidden states of all are kept, 4 · N · T · D bytes; beside them a matrix's Gram matrix and little more than two
        copies of it, and four of the matrix, in float32.
      quantization: ``"int4"``, ``"nf4"``, ``"int8"``, or a `Quantization`.
      attention_mask: ``[N, T]`` bool or int; 0 where there is padding, which is not gone by. All ones by default.
      batch_size: windows that are read at a time.
      progress: show a progress bar; by default for more than 1 GB on a terminal or in a notebook.

    Raises:
      ValueError: what `quantize` refuses; abstract params; ids, a mask or a batch size that make no sense; a matrix or
        inputs of one that are not finite.
    """
    made = check_quantizable(params, quantization)
    leaves = jax.tree.leaves((params, ids, attention_mask))
    if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in leaves):
        raise ValueError("gptq goes by the numbers of params and ids: it cannot run inside jit, or on abstract params")
    check_placement(made, params.config, params.head, params.placement)
    windows = _windows(params.config, ids, attention_mask, batch_size)
    declared = declare(params.config, params.head)
    layers = params.config.num_hidden_layers
    sizes = {weight: weight.size * (layers if weight.per_layer else 1) for weight in declared}
    total = sum(4 * size for weight, size in sizes.items() if made.kind_of(weight) is not None)
    with progress_bar(total, f"quantizing to {made.kind}", progress) as advance:
        return _Walk(made, _Model(params.config, params.head, params.placement), declared, advance).of(params, windows)


@dataclasses.dataclass(frozen=True)
class _Model:
    """The parts of the model, each with its weights only. Hashable: programs are compiled once for all layers, and for
    the next call. (Its methods are not: those of two equal models differ.)"""

    config: OPTConfig
    head: str | None
    placement: Placement | None

    def embed(self, weights: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return embed(self._params(weights), Inputs(ids=ids, mask=mask), jnp.float32)

    def layer(self, weights: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, t = mask.shape
        visible = causal_mask(mask, jnp.arange(t, dtype=jnp.int32))
        block = block_of_queries(self.placement, b, t, t, self.config.num_attention_heads)
        options: Any = {"head_mask": None, "key": None, "past": None, "query_block": block}
        return decoder_layer(self.config, self.placement, weights, x, visible, **options)[0]

    def finish(self, weights: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return finish(self._params(weights), x)

    def _params(self, weights: Any) -> Params:
        return Params(weights, self.config, self.head, self.placement)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """From the embedding to the end, rounding what comes by."""

    quantization: Quantization
    model: _Model
    declared: tuple[Weight, ...]
    advance: Callable[[int], None]

    def of(self, params: Params, windows: list[tuple[np.ndarray, np.ndarray]]) -> Params:
        model, config = self.model, params.config
        ids, masks = zip(*windows, strict=True)
        outside = {name: _arrays(each) for name, each in params.weights.items() if name != "layers"}
        for weight in self.declared:
            if is_table(weight):
                outside = _put(outside, weight.path, partial(self._as_ever, weight))
        if config.has_projections:
            outside = self._rounded(_Model.embed, outside, ("project_in",), "", ids, masks)
        states = [_run(_Model.embed, model, outside, *each) for each in zip(ids, masks, strict=True)]
        layers = []
        for i in range(config.num_hidden_layers):
            layer = _arrays(params.layer(i))
            for stage in STAGES:
                layer = self._rounded(_Model.layer, layer, stage, "layers.", states, masks)
            for n, mask in enumerate(masks):  # one in place of another: of all there would be two at the end of a layer
                states[n] = _run(_Model.layer, model, layer, states[n], mask)
            layers.append(layer)
        if config.has_projections:
            outside = self._rounded(_Model.finish, outside, ("project_out",), "", states, masks)
        result = dataclasses.replace(params, weights=outside | {"layers": layers})
        return stack_layers(result) if params.stacked else result

    def _as_ever(self, weight: Weight, array: jax.Array) -> Any:
        self.advance(4 * weight.size)
        return quantize_weight(self.quantization, weight, array, self.model.placement, array.dtype)

    def _rounded(
        self, part: Part, weights: Any, stage: tuple[str, ...], prefix: str, inputs: Sequence[Any], masks: Sequence[Any]
    ) -> Any:
        """The weights of a part, those of a stage quantized for what comes to them."""
        path = f"{stage[0]}.weight"
        grams = (_gram(part, self.model, weights, *each, path=path) for each in zip(inputs, masks, strict=True))
        gram = self._whole(reduce(jnp.add, grams))
        if not bool(jnp.isfinite(gram).all()):
            raise ValueError(f"what comes to {prefix}{path} is not finite: these weights do not work as they are")
        for name in stage:
            weight = next(each for each in self.declared if each.path == f"{prefix}{name}.weight")
            weights = _put(weights, f"{name}.weight", partial(self._compensated, weight, gram))
        return weights

    def _compensated(self, weight: Weight, gram: jax.Array, array: jax.Array) -> Any:
        how = {"kind": self.quantization.kind, "group_size": self.quantization.group_size}
        whole = self._whole(array)
        if not bool(jnp.isfinite(whole).all()):
            raise ValueError(f"{weight.path} is not finite in all its numbers")
        scales = scales_of(whole, **how)
        best = compensate(whole, gram, scales, **how)
        made = quantize_weight(self.quantization, weight, best, self.model.placement, array.dtype, scales)
        jax.block_until_ready(made)  # or the next ones would be begun, each with its copies
        self.advance(4 * weight.size)
        return made

    def _whole(self, array: jax.Array) -> jax.Array:
        """On every device: columns are rounded in turn, so that a matrix in parts would travel for each of them."""
        placement = self.model.placement
        return array if placement is None else jax.device_put(array, NamedSharding(placement.mesh, PartitionSpec()))


@partial(jax.jit, static_argnums=(0, 1))
def _run(part: Part, model: _Model, weights: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
    return part(model, weights, x, mask)


@partial(jax.jit, static_argnums=(0, 1), static_argnames="path")
def _gram(part: Part, model: _Model, weights: Any, x: jax.Array, mask: jax.Array, *, path: str) -> jax.Array:
    """``Σ x xᵀ`` ``[in, in]`` over the tokens that come to a matrix; what follows it in the pass is left out."""
    seen: list[jax.Array] = []
    part(model, _put(weights, path, lambda weight: Observed(weight, seen.append)), x, mask)
    (inputs,) = seen
    inputs = jnp.where(mask[..., None], inputs.astype(jnp.float32), 0.0)
    return jnp.einsum("bti,btj->ij", inputs, inputs, precision=jax.lax.Precision.HIGHEST)


def _windows(config: OPTConfig, ids: Any, attention_mask: Any, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and masks ``[batch_size, T]``, the last ones filled up with rows of padding: one program serves all."""
    ids = np.asarray(as_ids(ids, config.vocab_size))
    rows, columns = ids.shape
    mask = np.ones_like(ids, bool) if attention_mask is None else np.asarray(as_mask(attention_mask, ids.shape))
    check_positions(config, mask, None, None, ids.shape)
    if not mask.any():
        raise ValueError("attention_mask is 0 everywhere: there is no text to go by")
    batch_size = min(as_count("batch_size", batch_size, 1), rows)
    more = ((0, -rows % batch_size), (0, 0))
    ids, mask = (np.pad(each, more).reshape(-1, batch_size, columns) for each in (ids, mask))
    return list(zip(ids, mask, strict=True))


def _arrays(weights: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf)), weights)


def _put(weights: Any, path: str, make: Callable[[Any], Any]) -> Any:
    """Nested weights with ``make(weight)`` in place of the one at a dotted path."""
    first, _, rest = path.partition(".")
    return weights | {first: _put(weights[first], rest, make) if rest else make(weights[first])}
