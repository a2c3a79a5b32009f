"""Which modules get a low-rank adapter, of which rank: PEFT's `LoraConfig`, its fields and its rules for matching."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What PEFT does without target_modules for OPT, as the paper did.
DEFAULT_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR = "all-linear"
LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out")
BIASES = ("none", "all", "lora_only")
TASK_TYPES = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_CLS": "sequence_classification",
    "QUESTION_ANS": "question_answering",
    "FEATURE_EXTRACTION": None,
}
_NOT_HERE = {
    "use_dora": "weight-decomposed adapters (DoRA)",
    "lora_bias": "biases of the low-rank matrices",
    "trainable_token_indices": "single trainable tokens",
    "target_parameters": "adapters of parameters that are no module",
    "layer_replication": "layers that stand several times",
}
# Initializations that change the base model's weights too: an adapter made so is wrong beside the original ones.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
# These of PEFT's fields say nothing of what an adapter computes, or nothing for a model of linear layers.
_SAYS_NOTHING = frozenset(
    "auto_mapping corda_config ensure_weight_tying eva_config fan_in_fan_out inference_mode loftq_config "
    "megatron_core peft_type peft_version qalora_group_size runtime_config".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How a model is adapted. The fields are those of PEFT's class of this name. Frozen and hashable.

    Attributes:
      r: the rank: an adapted matrix ``[out, in]`` is added to by ``lora_B [out, r]`` times ``lora_A [r, in]``.
      lora_alpha: that product is multiplied by ``lora_alpha / r``.
      lora_dropout: of what goes into lora_A, wherever a function is given a ``dropout_key``.
      target_modules: names of modules, each the end of a path (``"q_proj"``, ``"layers.0.fc1"``); or one regular
        expression for whole paths such as ``model.decoder.layers.0.fc1``; or ``"all-linear"``, all but the head. By
        default q_proj and v_proj.
      exclude_modules: the same, of modules that are left out.
      modules_to_save: names of modules that are trained whole. The head of a classifier and of question answering is
        one of them, said or not.
      bias: ``"none"``; ``"all"``, or ``"lora_only"``, those of the adapted modules: biases that are trained too.
      use_rslora: multiply by ``lora_alpha / √r`` instead (Kalajdzievski 2023).
      rank_pattern, alpha_pattern: r and lora_alpha of some modules: a dict from the end of a path, or a regular
        expression for it, to a number.
      layers_to_transform: only these layers, a number or several.
      layers_pattern: the name of the list of layers, as PEFT has it; there is only ``"layers"`` here.
      init_lora_weights: True for a uniform lora_A and a zero lora_B; ``"gaussian"`` for a normal lora_A; False for both
        random, which changes the model from the start.
      task_type: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, ``"QUESTION_ANS"``, ``"FEATURE_EXTRACTION"``; by default the head's.
      base_model_name_or_path, revision: of the model that is adapted, for whoever reads the file.
      use_dora, lora_bias, trainable_token_indices, target_parameters, layer_replication: of PEFT, not to be had here.

    Raises:
      ValueError: a value that makes no sense, or asks for what is not to be had.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    use_rslora: bool = False
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    init_lora_weights: bool | str = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: Any = None
    target_parameters: Any = None
    layer_replication: Any = None

    def __post_init__(self):
        for name, what in _NOT_HERE.items():
            if getattr(self, name):
                raise ValueError(f"optjax has no {what}: leave {name} out")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _pattern(name, getattr(self, name)))
        object.__setattr__(self, "layers_to_transform", _layers(self.layers_to_transform))
        for name, value in (("r", self.r), *(("rank_pattern", rank) for _, rank in self.rank_pattern)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} should hold integers of 1 or more, not {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout should lie in [0, 1), not {self.lora_dropout!r}")
        if self.bias not in BIASES:
            raise ValueError(f"bias should be one of {', '.join(map(repr, BIASES))}, not {self.bias!r}")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(f"task_type should be one of {', '.join(TASK_TYPES)}, not {self.task_type!r}")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save should be a list of names, not {self.modules_to_save!r}")
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                _check_regex("target_modules", self.target_modules)
            if self.layers_to_transform is not None:
                raise ValueError("layers_to_transform goes with a list of target_modules, not with one expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern goes with layers_to_transform, which is not given")
        init = self.init_lora_weights
        if isinstance(init, str) and init.split("_")[0].lower() in _CHANGE_THE_BASE:
            raise ValueError(
                f"init_lora_weights={init!r} changes the base model's weights too, which optjax leaves as they are; "
                "PEFT writes such an adapter as an ordinary one by save_pretrained(…, path_initial_model_for_…)"
            )
        if not isinstance(init, bool | str):
            raise ValueError(f"init_lora_weights should be True, False or 'gaussian', not {init!r}")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> LoraConfig:
        """From what adapter_config.json holds.

        Raises:
          ValueError: another method than LoRA, a value that makes no sense, or one that asks for what is not to be had.
        """
        kind = entries.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(f"peft_type is {kind!r}, and optjax knows 'LORA' only")
        known = {field.name for field in dataclasses.fields(cls)}
        foreign = [name for name, value in entries.items() if name not in known | _SAYS_NOTHING and value]
        if foreign:
            raise ValueError(f"optjax does not know {', '.join(sorted(foreign))} of an adapter's config")
        return cls(**{name: value for name, value in entries.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json is to hold: PEFT's names, plain values."""
        entries: dict[str, Any] = {"peft_type": "LORA", "inference_mode": True, "fan_in_fan_out": False}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("rank_pattern", "alpha_pattern"):
                value = dict(value)
            entries[field.name] = list(value) if isinstance(value, tuple) else value
        # By name, as readers of such files expect it.
        targets = {None: DEFAULT_TARGETS, ALL_LINEAR: LINEAR}.get(self.target_modules, self.target_modules)
        return entries | {"target_modules": targets if isinstance(targets, str) else list(targets)}

    def targets(self, path: str) -> bool:
        """Whether the linear module at ``path`` gets an adapter; ``"model.decoder.layers.0.fc1"``, as PEFT has it."""
        if self.exclude_modules is not None and _matches(self.exclude_modules, path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save or ()):
            return False
        targets = DEFAULT_TARGETS if self.target_modules is None else self.target_modules
        if targets == ALL_LINEAR:
            return path.startswith(("model.decoder.", "decoder."))
        if path in targets and not isinstance(targets, str):
            return True
        return _matches(targets, path) and self._has_layer(path)

    def _has_layer(self, path: str) -> bool:
        layers = self.layers_to_transform
        if layers is None:
            return True
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (re.match(rf".*\.{name}\.(\d+)\.", path) for name in names or [r"[^.]*"])
        layer = next((match for match in found if match), None)
        return layer is not None and int(layer[1]) in ([layers] if isinstance(layers, int) else layers)

    def saves(self, path: str) -> bool:
        """Whether the module at ``path`` is trained whole."""
        return any(path.endswith(name) for name in self.modules_to_save or ())

    def rank(self, path: str) -> int:
        """r of a module."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        alpha, r = _by_pattern(self.alpha_pattern, path, self.lora_alpha), self.rank(path)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def _matches(names: Sequence[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(pattern: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    found = (value for name, value in pattern if re.match(rf"(.*\.)?({name})$", path))
    return next(found, default)


def _names(field: str, value: Any) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{field} should be names of modules, not {value!r}")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def _pattern(field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else tuple(value or ())
    for name, number in pairs:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{field} should map names of modules to numbers, not {name!r} to {number!r}")
        _check_regex(field, name)
    return pairs


def _layers(value: Any) -> tuple[int, ...] | int | None:
    layers = () if value is None else (value,) if isinstance(value, int) else tuple(value)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layers_to_transform should be numbers of layers, from 0, not {value!r}")
    return value if isinstance(value, int) else layers or None


def _check_regex(field: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field} {text!r} is no regular expression: {error}") from None
