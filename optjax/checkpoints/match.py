"""Lays a checkpoint's tensors beside the declaration: what goes where, and everything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce

import jax
import numpy as np

from optjax.checkpoints.contents import Contents
from optjax.checkpoints.errors import CheckpointError, listing, shorten
from optjax.checkpoints.quantized import COLUMN_SCALE, SCALE, stored
from optjax.checkpoints.tensors import TensorRef
from optjax.config import OPTConfig
from optjax.declaration import HEADS, Weight, declare
from optjax.params import FLOATS, wider
from optjax.quantization.quantize import Quantization

_ARCHITECTURES = {
    "OPTForCausalLM": "causal_lm",
    "OPTModel": None,
    "OPTForSequenceClassification": "sequence_classification",
    "OPTForQuestionAnswering": "question_answering",
}
_OWN_HEADS = ("score.", "qa_outputs.")
_HEAD_WEIGHTS = ("lm_head.", *_OWN_HEADS)
# In the order in which they are listed.
_PROBLEMS = (
    "problems with the files",
    "missing",
    "of the wrong shape",
    "not floating point (quantized?)",
    "unexpected",
)


@dataclass
class Match:
    """Which tensor each weight is read from; ``created`` lists the head's weights that the files lack.

    A weight that is quantized in the files has its codes in ``tensors`` and its scales in ``scales``; a table, unless
    the files are old, has those of its columns in ``column_scales``.
    """

    tensors: dict[tuple[str, int | None], TensorRef]
    scales: dict[tuple[str, int | None], TensorRef] = field(default_factory=dict)
    column_scales: dict[tuple[str, int | None], TensorRef] = field(default_factory=dict)
    created: list[Weight] = field(default_factory=list)

    def dtype_of_layers(self, weight: Weight) -> np.dtype:
        """One that holds a weight of every layer exactly, as far as jax has their own."""
        own = {tensor.dtype for (path, _), tensor in self.tensors.items() if path == weight.path}
        return reduce(wider, map(jax.dtypes.canonicalize_dtype, own))


def choose_head(config: OPTConfig, contents: Contents) -> str | None:
    """The head that config.json's ``architectures`` names, else the one whose weights are there."""
    architectures = json.loads(dict(config.extra).get("architectures", "null"))
    for name in architectures if isinstance(architectures, list) else ():
        name = str(name).removeprefix("Flax").removeprefix("TF")
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    if "score.weight" in contents.tensors:
        return "sequence_classification"
    return "question_answering" if "qa_outputs.weight" in contents.tensors else "causal_lm"


def match(
    contents: Contents,
    config: OPTConfig,
    head: str | None,
    *,
    create_head: bool,
    new_head: bool = False,
    quantization: Quantization | None = None,
) -> Match:
    """The tensor of every weight, and the scales of those that are quantized.

    With ``new_head`` the files count as having no head of its own weights.

    Raises:
      CheckpointError: something is missing, unexpected, of the wrong shape or of a dtype that it should not have: all
        of it is listed.
    """
    if head not in HEADS:
        raise ValueError(f"no head named {head!r}; there are: {', '.join(map(repr, HEADS))}")
    problems: dict[str, list[str]] = {kind: [] for kind in _PROBLEMS}
    problems["problems with the files"] += contents.problems
    tensors = {path: t for path, t in contents.tensors.items() if not (new_head and path.startswith(_OWN_HEADS))}
    if config.num_hidden_layers > len(tensors):
        raise CheckpointError(
            f"config.json says num_hidden_layers={config.num_hidden_layers}, but there are only "
            f"{len(tensors)} tensors in the checkpoint"
        )
    _use_only_copy(tensors, config)

    out = Match({})
    missing: list[Weight] = []
    for weight, layer, path in expected(config, head):
        codes = None if quantization is None else stored(quantization, weight)
        if codes is not None and (path in tensors or not (path.startswith(_HEAD_WEIGHTS) and create_head)):
            parts = [("", codes.values, out.tensors), (SCALE, codes.scales, out.scales)]
            if codes.column_scales is not None and path + COLUMN_SCALE in tensors:
                parts.append((COLUMN_SCALE, codes.column_scales, out.column_scales))
            for name, like, found in parts:
                tensor = tensors.pop(path + name, None)
                if tensor is None:
                    problems["missing"].append(f"{path}{name} {like.shape}")
                elif (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                    text = f"{path}{name}: {tensor.dtype} {tensor.shape} in the file, {like.dtype} {like.shape} by"
                    problems["of the wrong shape"].append(f"{text} its quantization")
                else:
                    found[weight.path, layer] = tensor
            continue
        tensor = tensors.pop(path, None)
        if tensor is None:
            if path.startswith(_HEAD_WEIGHTS) and create_head:
                out.created.append(weight)
            else:
                missing.append(weight)
                problems["missing"].append(f"{path} {weight.shape}")
        elif tensor.shape != weight.shape:
            text = f"{path}: {tensor.shape} in the file, {weight.shape} by the config"
            problems["of the wrong shape"].append(text)
        elif tensor.dtype not in FLOATS:
            problems["not floating point (quantized?)"].append(f"{path}: {tensor.dtype}")
        else:
            out.tensors[weight.path, layer] = tensor
    problems["unexpected"] += _leftovers(tensors, config, head)
    if any(problems.values()):
        raise CheckpointError(_message(problems, missing, config, head))
    return out


def expected(config: OPTConfig, head: str | None) -> Iterator[tuple[Weight, int | None, str]]:
    """Every weight with every layer it is in, and its path with the layer's number filled in."""
    for weight in declare(config, head):
        if weight.per_layer:
            for i in range(config.num_hidden_layers):
                yield weight, i, weight.path.replace("layers.", f"layers.{i}.", 1)
        else:
            yield weight, None, weight.path


def _use_only_copy(tensors: dict[str, TensorRef], config: OPTConfig) -> None:
    """Tied weights may be stored under either name or both (Hugging Face #43159); the embedding's counts.

    What is called the head and has another shape is none, and is left to be found unexpected.
    """
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        if head.shape == tensors.setdefault("embed_tokens.weight", head).shape:
            del tensors["lm_head.weight"]


def _leftovers(tensors: dict[str, TensorRef], config: OPTConfig, head: str | None) -> Iterator[str]:
    """Tensors that nothing asked for, less those that are allowed: another head, zero biases, unit norms."""
    full = config.replace(enable_bias=True, layer_norm_elementwise_affine=True)
    kinds = {path: (weight.kind, weight.shape) for weight, _, path in expected(full, None)}
    # The bias that some training gives a head; left out, the head would compute something else.
    own = {"causal_lm": ("lm_head", config.vocab_size), "sequence_classification": ("score", config.num_labels)}
    name, n = own.get(head or "", ("", 0))
    its_bias = f"{name}.bias"
    kinds[its_bias] = ("bias", (n,))
    for path, tensor in tensors.items():
        odd = path == its_bias or (path == "lm_head.weight" and head == "causal_lm" and config.tie_word_embeddings)
        if path.startswith(_HEAD_WEIGHTS) and not odd:
            continue
        kind, shape = kinds.get(path, (None, None))
        if kind in ("bias", "norm_weight", "norm_bias") and shape == tensor.shape and tensor.dtype in FLOATS:
            # Some Galactica files store what their config switches off (BlinkDL and others' conversions).
            neutral = 1 if kind == "norm_weight" else 0
            if bool((tensor.read() == neutral).all()):
                continue
            switch = "enable_bias" if kind == "bias" else "layer_norm_elementwise_affine"
            why = "and OPT has no such bias" if path == its_bias else f"though the config says {switch}=false"
            yield f"{path} {tensor.shape}: not all {neutral}, {why}"
        else:
            yield f"{shorten(path)} {tensor.shape}"


def _message(problems: dict[str, list[str]], missing: list[Weight], config: OPTConfig, head: str | None) -> str:
    lines = ["the checkpoint does not fit its config"]
    lines += [listing(kind, items) for kind, items in problems.items() if items]
    if missing and all(w.path.startswith(_HEAD_WEIGHTS) for w in missing):
        lines.append(f"The head {head!r} is not in the checkpoint: pass key=jax.random.key(0) to create one.")
    wrong = problems["of the wrong shape"]
    if wrong and all(text.startswith(_OWN_HEADS) for text in wrong):
        lines.append("The head is of another size: pass new_head=True and key=jax.random.key(0) for one in its place.")
    biases = sum(w.kind == "bias" for w, _, _ in expected(config, head))
    if len(missing) == biases > 0 and all(w.kind == "bias" for w in missing):
        lines.append("All biases are missing: a model without them has enable_bias=false in its config.json.")
    return "\n".join(lines)
