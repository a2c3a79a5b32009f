"""The one declaration of every weight: its place, shape, logical axes, initializer and its name in Hugging Face files.

Weights keep Hugging Face's names and orientation: a linear weight is ``[out, in]``, which loads without a transpose and
which XLA's CPU and TPU backends multiply at full speed. Everything that must know the list of weights (initializing,
counting, loading, saving, sharding) asks `declare`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from optjax.config import OPTConfig

HEADS = (None, "causal_lm", "sequence_classification", "question_answering")
# What splits a dimension: a logical axis; several, one within the other; or nothing ever.
Axis = str | tuple[str, ...] | None
Kind = Literal["embedding", "linear", "output", "bias", "norm_weight", "norm_bias"]


@dataclass(frozen=True)
class Weight:
    """One weight, or one of every layer.

    Attributes:
      path: its place in the params, dotted; a layer's weights start with ``layers.``.
      shape: without the layer dimension.
      axes: the logical name of each dimension, which sharding rules map to mesh axes. A matrix that makes heads or the
        feed-forward's values has ``("heads", "model")`` at its first dimension and nothing at its second: its rows are
        split by heads, and within these by what splits the model's weights, or its columns are by the latter,
        whichever the platform gathers best.
      kind: what it does, which decides its initializer (``output`` is a linear layer that writes to the residual
        stream) and its name and orientation in Flax and TF files.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    kind: Kind

    @property
    def per_layer(self) -> bool:
        return self.path.startswith("layers.")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def logical(self) -> tuple[str, ...]:
        """The logical axes of all dimensions, in their order."""
        return tuple(name for axis in self.axes if axis for name in ((axis,) if isinstance(axis, str) else axis))

    def keys(self, layer: int | None = None) -> tuple[str | int, ...]:
        """The steps down the params tree to this weight: ``("layers", 3, "fc1", "weight")``."""
        first, *rest = self.path.split(".")
        return (first, layer, *rest) if self.per_layer and layer is not None else (first, *rest)

    def hf_name(self, layer: int | None = None) -> str:
        """The name of this tensor in transformers' state dict, with ``layer`` filled in."""
        path = self.path.replace("layers.", f"layers.{layer}.", 1) if self.per_layer else self.path
        return path if self.path.split(".")[0] in _OUTSIDE_DECODER else f"model.decoder.{path}"


_OUTSIDE_DECODER = ("lm_head", "score", "qa_outputs")


@cache
def declare(config: OPTConfig, head: str | None = "causal_lm") -> tuple[Weight, ...]:
    """Every weight of the model, in the order of the forward pass.

    Logical axes: vocab, embed (E), model (D), heads (H·K), mlp (F), position, labels; and projection (D) where E is
    not D, as a matrix with E and D may be split along one of them only.

    Raises:
      ValueError: there is no such head, or the config is none.
    """
    if not isinstance(config, OPTConfig):
        raise ValueError(f"expected an OPTConfig, got {type(config).__name__}")
    if head not in HEADS:
        raise ValueError(f"no head named {head!r}; there are: {', '.join(map(repr, HEADS))}")
    d, e, f, v = config.hidden_size, config.embed_dim, config.ffn_dim, config.vocab_size
    weights = [
        Weight("embed_tokens.weight", (v, e), ("vocab", "embed"), "embedding"),
        # Hugging Face's table has two rows before position 0 (#20761); see `model.POSITION_OFFSET`.
        Weight("embed_positions.weight", (config.max_position_embeddings + 2, d), ("position", "model"), "embedding"),
    ]
    if config.has_projections:
        weights.append(Weight("project_in.weight", (d, e), ("projection", "embed"), "linear"))
    weights += _norm(config, "layers.self_attn_layer_norm")
    for name in ("q_proj", "k_proj", "v_proj"):
        weights += _linear(config, f"layers.self_attn.{name}", d, d, ("heads", "model"), None, "linear")
    weights += _linear(config, "layers.self_attn.out_proj", d, d, "model", "heads", "output")
    weights += _norm(config, "layers.final_layer_norm")
    weights += _linear(config, "layers.fc1", f, d, ("mlp", "model"), None, "linear")
    weights += _linear(config, "layers.fc2", d, f, "model", "mlp", "output")
    if config.has_final_layer_norm:
        weights += _norm(config, "final_layer_norm")
    if config.has_projections:
        weights.append(Weight("project_out.weight", (e, d), ("embed", "projection"), "linear"))
    if head == "causal_lm" and not config.tie_word_embeddings:
        weights.append(Weight("lm_head.weight", (v, e), ("vocab", "embed"), "linear"))
    if head == "sequence_classification":
        weights.append(Weight("score.weight", (config.num_labels, e), ("labels", "embed"), "linear"))
    if head == "question_answering":
        weights.append(Weight("qa_outputs.weight", (2, e), ("labels", "embed"), "linear"))
        weights.append(Weight("qa_outputs.bias", (2,), ("labels",), "bias"))
    return tuple(weights)


@cache
def logical_axes(config: OPTConfig, head: str | None = "causal_lm") -> dict[str, Any]:
    """The logical axes of every weight, nested as the params are; of one layer for all, under ``layers``."""
    tree: dict[str, Any] = {}
    for weight in declare(config, head):
        *steps, last = weight.path.split(".")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = weight.axes
    return tree


def _linear(config: OPTConfig, path: str, n_out: int, n_in: int, axis_out: Axis, axis_in: Axis, kind: Kind):
    weights = [Weight(f"{path}.weight", (n_out, n_in), (axis_out, axis_in), kind)]
    if config.enable_bias:
        # Of a bias only what heads or the feed-forward split: its bytes are not worth a gather.
        axis = axis_out[0] if isinstance(axis_out, tuple) else axis_out
        weights.append(Weight(f"{path}.bias", (n_out,), (axis,), "bias"))
    return weights


def _norm(config: OPTConfig, path: str):
    if not config.layer_norm_elementwise_affine:
        return []
    shape, axes = (config.hidden_size,), ("model",)
    return [Weight(f"{path}.weight", shape, axes, "norm_weight"), Weight(f"{path}.bias", shape, axes, "norm_bias")]


def count_params(config: OPTConfig, head: str | None = "causal_lm") -> int:
    """Number of parameters; a tied head counts once."""
    layers = config.num_hidden_layers
    return sum(w.size * (layers if w.per_layer else 1) for w in declare(config, head))
