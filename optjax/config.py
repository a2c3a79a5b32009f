"""The architecture of an OPT model: every field of Hugging Face's OPTConfig, frozen and hashable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish", "tanh")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """The shape of an OPT model. Names and defaults are those of ``transformers.OPTConfig``.

    The config is static data: two configs that compare equal compile to the same program. Fields of a ``config.json``
    that the architecture does not know are kept in ``extra`` and written back by `to_json`; they take no part in
    equality. ``word_embed_proj_dim=None`` means ``hidden_size``.

    Raises:
      ValueError: a field has an impossible value; the message names all of them.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    extra: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        problems = list(_problems(self))
        if problems:
            raise ValueError("this is not a possible OPTConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """E, the width of the word embeddings: ``word_embed_proj_dim``, never None."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a norm follows the last layer: pre-norm models only (Hugging Face #17653)."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def has_projections(self) -> bool:
        """Whether embeddings are projected in and out of the model's width (OPT-350m)."""
        return self.embed_dim != self.hidden_size

    def replace(self, **changes: Any) -> OPTConfig:
        """A copy with fields changed; ``hidden_size`` takes ``word_embed_proj_dim`` along where they were equal."""
        if "hidden_size" in changes and not self.has_projections:
            changes.setdefault("word_embed_proj_dim", None)
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OPTConfig:
        """The config of a published size: ``opt-125m`` … ``opt-175b``, ``galactica-125m`` … ``galactica-120b``.

        Raises:
          ValueError: no preset has that name.
        """
        from optjax.presets import PRESETS

        key = name.lower().removeprefix("facebook/")
        if key not in PRESETS:
            raise ValueError(f"no preset named {name!r}; there are: {', '.join(PRESETS)}")
        return cls(**(PRESETS[key] | overrides))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OPTConfig:
        """From the content of a Hugging Face ``config.json``. Unknown fields are kept in ``extra``.

        Raises:
          ValueError: ``model_type`` is there and is not ``opt``, or a field is impossible.
        """
        model_type = fields.get("model_type", "opt")
        if model_type != "opt":
            raise ValueError(f"config.json describes a {model_type!r} model; optjax reads 'opt' models only")
        # Written as null they are as if they were not there: transformers has two labels then.
        labels = ("num_labels", "id2label", "label2id")
        fields = {k: v for k, v in fields.items() if v is not None or k not in labels}
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        values = {k: v for k, v in fields.items() if k in known}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        if "num_labels" not in values and isinstance(fields.get("id2label"), Mapping):
            values["num_labels"] = len(fields["id2label"])
        extra = tuple((k, json.dumps(v)) for k, v in fields.items() if k not in known)
        return cls(**values, extra=extra)

    @classmethod
    def from_json(cls, source: str | Path) -> OPTConfig:
        """From a ``config.json``, a folder that holds one, or JSON text.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the text is not a JSON object, or describes no OPT model.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            text, where = source, "the text given"
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(f"no config.json at {path}")
            text, where = path.read_text(encoding="utf-8", errors="replace"), str(path)
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{where} should hold a JSON object, but holds a {type(fields).__name__}")
        return cls.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """The content of a Hugging Face ``config.json``, unknown fields included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        extra = {k: json.loads(v) for k, v in self.extra}
        # Hugging Face derives num_labels from id2label, so the two must agree.
        num_labels = fields.pop("num_labels")
        if len(extra.get("id2label", {0: "", 1: ""})) != num_labels:
            extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
            extra["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
        return {"model_type": "opt"} | fields | extra

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text as of Hugging Face's ``config.json``; written to ``path`` (a file or a folder) if one is given."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        if path is not None:
            path = Path(path)
            (path / "config.json" if path.is_dir() else path).write_text(text, encoding="utf-8")
        return text


def _problems(c: OPTConfig):
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings")
    bad = set()
    for name in (*sizes, "num_attention_heads", "word_embed_proj_dim", "num_labels"):
        value = getattr(c, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            bad.add(name)
            yield f"{name} should be a positive integer, not {value!r}"
    if not bad & {"hidden_size", "num_attention_heads"} and c.hidden_size % c.num_attention_heads:
        yield f"hidden_size {c.hidden_size} is not divisible by num_attention_heads {c.num_attention_heads}"
    for name in ("dropout", "attention_dropout", "layerdrop"):
        value = getattr(c, name)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            yield f"{name} should be at least 0 and less than 1, not {value!r}"
    if not isinstance(c.init_std, int | float) or not 0 <= c.init_std < float("inf"):
        yield f"init_std should be a number of at least 0, not {c.init_std!r}"
    flags = ("do_layer_norm_before", "_remove_final_layer_norm", "use_cache", "enable_bias")
    for name in (*flags, "layer_norm_elementwise_affine", "tie_word_embeddings"):
        if not isinstance(getattr(c, name), bool):
            yield f"{name} should be true or false, not {getattr(c, name)!r}"
    if c.activation_function not in ACTIVATIONS:
        yield f"activation_function {c.activation_function!r} is not one of {', '.join(ACTIVATIONS)}"
    if c.problem_type is not None and c.problem_type not in PROBLEM_TYPES:
        yield f"problem_type {c.problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}"
    eos = c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,)
    for name, value in [("pad_token_id", c.pad_token_id), ("bos_token_id", c.bos_token_id)] + [
        ("eos_token_id", e) for e in eos
    ]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            yield f"{name} should be an integer or null, not {value!r}"
