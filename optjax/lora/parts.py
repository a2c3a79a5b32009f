"""The adapters: a small pytree of their own, nested by the names of the modules that they change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from optjax.config import OPTConfig
from optjax.declaration import Weight, declare
from optjax.lora.config import TASK_TYPES, LoraConfig

LOW_RANK = ("lora_A", "lora_B")
# Of PEFT, which has these for every classifier, whatever its head is called.
_HEADS = {"sequence_classification": ("classifier", "score"), "question_answering": ("qa_outputs",)}
_FOREIGN = ("classifier",)


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["config", "head"])
@dataclasses.dataclass(frozen=True)
class Adapters:
    """What is trained beside frozen params: a pytree whose leaves are arrays, and of no model's size.

    ``weights`` is nested as those of `Params` are, with the adapted modules only. A module has ``lora_A`` ``[r, in]``
    and ``lora_B`` ``[out, r]``, or a ``weight`` or ``bias`` of its own in place of the model's, or both:
    ``adapters["layers"][0]["self_attn"]["q_proj"]["lora_A"]``. The layers stand in a list, or stacked ``[L, …]`` like
    those of the params; a stack of different ranks is filled up with zeros, which training leaves zeros.

    Attributes:
      config: the `LoraConfig`.
      head: of the model that they were made for.
    """

    weights: dict[str, Any]
    config: LoraConfig
    head: str | None = "causal_lm"

    def __getitem__(self, name: str) -> Any:
        return self.weights[name]

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked ``[L, …]``."""
        return isinstance(self.weights.get("layers"), dict)

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.weights))


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of the adapters of a model, of one layer or outside the layers.

    Attributes:
      weight: the model's weight that it changes.
      layer: of a weight of the layers; None for one outside.
      name: ``"lora_A"``, ``"lora_B"``, or ``"weight"`` or ``"bias"`` where it stands in place of the model's.
      rank: of the first two.
    """

    weight: Weight
    layer: int | None
    name: str
    rank: int = 0

    @property
    def keys(self) -> tuple[str | int, ...]:
        """The steps down the tree to it, with the layer's number."""
        return (*self.weight.keys(self.layer)[:-1], self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.name not in LOW_RANK:
            return self.weight.shape
        n_out, n_in = self.weight.shape
        return (self.rank, n_in) if self.name == "lora_A" else (n_out, self.rank)


def module_path(weight: Weight, layer: int | None, head: str | None) -> str:
    """The path of a weight's module in transformers' model, as PEFT matches it."""
    path = weight.hf_name(layer).rpartition(".")[0]
    return path.removeprefix("model.") if head is None else path


def declare_parts(config: OPTConfig, head: str | None, lora: LoraConfig) -> list[Part]:
    """Every array that is trained, in the order of the forward pass.

    Raises:
      ValueError: names of modules that the model does not have, or that cannot be adapted; nothing to adapt.
    """
    _check_names(config, head, lora)
    parts = []
    for weight in declare(config, head):
        for layer in range(config.num_hidden_layers) if weight.per_layer else (None,):
            path, last = module_path(weight, layer, head), weight.path.rpartition(".")[2]
            matrix = last == "weight" and weight.kind in ("linear", "output")
            if lora.saves(path):
                parts.append(Part(weight, layer, last))
            elif matrix and lora.targets(path):
                parts += [Part(weight, layer, name, lora.rank(path)) for name in LOW_RANK]
            elif last == "bias" and (lora.bias == "all" or (lora.bias == "lora_only" and lora.targets(path))):
                parts.append(Part(weight, layer, last))
    return parts


def _check_names(config: OPTConfig, head: str | None, lora: LoraConfig) -> None:
    """ValueError unless every name in a `LoraConfig` is of a module that can be adapted so."""
    layers = config.num_hidden_layers
    modules: dict[str, str] = {}  # path -> kind
    for weight in declare(config, head):
        for layer in range(layers) if weight.per_layer else (None,):
            modules.setdefault(module_path(weight, layer, head), weight.kind)
    linear = [path for path, kind in modules.items() if kind in ("linear", "output")]
    known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in linear))
    tied = head == "causal_lm" and config.tie_word_embeddings
    chosen = lora.layers_to_transform
    for layer in () if chosen is None else (chosen,) if isinstance(chosen, int) else chosen:
        if layer >= layers:
            raise ValueError(f"layers_to_transform names layer {layer}, and there are {layers}, from 0")
    targets = lora.target_modules
    for name in targets if isinstance(targets, tuple) else ():
        if name.endswith("lm_head") and tied:
            raise ValueError("lm_head is the word embedding (tie_word_embeddings): it has no weight to adapt")
        alone = dataclasses.replace(lora, target_modules=(name,), layers_to_transform=None, layers_pattern=None)
        others = [path for path in modules if path not in linear and alone.targets(path)]
        if others:
            raise ValueError(f"target_modules: {name!r} is {others[0]}, and only linear modules are adapted: {known}")
        alone = dataclasses.replace(alone, exclude_modules=None, modules_to_save=None)
        if not any(alone.targets(path) for path in linear):
            raise ValueError(f"target_modules: the model has no linear module {name!r}; it has: {known}")
    if not any(lora.targets(path) for path in linear):
        raise ValueError(f"target_modules {targets!r} and what goes with it leave no module; there are: {known}")
    for name in lora.modules_to_save or ():
        if tied and (name.endswith("lm_head") or "model.decoder.embed_tokens".endswith(name)):
            raise ValueError(
                f"modules_to_save: {name!r} is both the word embedding and the head (tie_word_embeddings), which PEFT "
                "would take apart; leave it out"
            )
        if name not in _FOREIGN and not any(path.endswith(name) for path in modules):
            raise ValueError(f"modules_to_save: the model has no module {name!r}; it has: {known}, and norms")


def as_config(config: Any, head: str | None) -> LoraConfig:
    """A `LoraConfig` for a model with a head, which is trained.

    Raises:
      ValueError: it is none, or one for another task.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"config should be an optjax.LoraConfig, not {type(config).__name__}")
    task = next(task for task, name in TASK_TYPES.items() if name == head)
    if config.task_type not in (None, task):
        raise ValueError(f"task_type {config.task_type!r} is not that of params with head {head!r}: {task!r}")
    saved = tuple(config.modules_to_save or ())
    saved += tuple(name for name in _HEADS.get(head or "", ()) if name not in saved)
    return dataclasses.replace(config, task_type=task, modules_to_save=saved or None)


def build(parts: list[Part], leaf: Callable[[Part], Any]) -> dict[str, Any]:
    """A tree of ``leaf(part)``, layers in a list."""
    tree: dict[str, Any] = {}
    layers = [part.layer for part in parts if part.layer is not None]
    if layers:
        tree["layers"] = [{} for _ in range(max(layers) + 1)]
    for part in parts:
        *steps, last = part.keys
        node: Any = tree
        for step in steps:
            node = node[step] if isinstance(step, int) else node.setdefault(step, {})
        node[last] = leaf(part)
    return tree


def walk(adapters: Adapters) -> Iterator[tuple[tuple[str, ...], int | None, dict[str, Any]]]:
    """Every module that has something: its path, without ``layers`` and the number; its layer; its arrays.

    The layer is None outside the layers, and where they are stacked.
    """

    def inside(node: dict[str, Any], path: tuple[str, ...], layer: int | None):
        own = {name: value for name, value in node.items() if not isinstance(value, dict)}
        if own:
            yield path, layer, own
        for name, value in node.items():
            if isinstance(value, dict):
                yield from inside(value, (*path, name), layer)

    for name, value in adapters.weights.items():
        if name != "layers":
            yield from inside(value, (name,), None)
        elif isinstance(value, dict):
            yield from inside(value, ("layers",), None)
        else:
            for i, each in enumerate(value):
                yield from inside(each, ("layers",), i)
