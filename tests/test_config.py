"""OPTConfig against transformers' class: fields, defaults, JSON both ways, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import transformers

from optjax import OPTConfig
from optjax.presets import PRESETS

# What transformers' base class gives an OPTConfig, and design.md or a head of ours needs.
BASE_FIELDS = {"tie_word_embeddings", "num_labels", "problem_type"}


def _hf_fields() -> set[str]:
    signature = inspect.signature(transformers.OPTConfig.__init__)
    return set(signature.parameters) - {"self", "kwargs"} | BASE_FIELDS


def test_every_field_and_default_is_transformers():
    ours = OPTConfig()
    assert {f.name for f in dataclasses.fields(OPTConfig)} - {"extra"} == _hf_fields()
    theirs = transformers.OPTConfig()
    for name in _hf_fields():
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name


@pytest.mark.parametrize("name", [*PRESETS, "default"])
def test_presets_through_transformers_and_back(name, tmp_path):
    config = OPTConfig() if name == "default" else OPTConfig.preset(name)
    config.to_json(tmp_path)
    theirs = transformers.OPTConfig.from_pretrained(tmp_path)
    for field in _hf_fields():
        assert getattr(theirs, field) == getattr(config, field), field

    theirs.save_pretrained(tmp_path / "back")
    assert OPTConfig.from_json(tmp_path / "back") == config
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is transformers.OPTConfig


@pytest.mark.parametrize("dtype_name", ["dtype", "torch_dtype"])
def test_config_json_of_transformers(dtype_name, tmp_path):
    """A config as older and newer versions write it, with labels of its own."""
    theirs = transformers.OPTConfig(
        hidden_size=24,
        num_attention_heads=3,
        word_embed_proj_dim=6,
        do_layer_norm_before=False,
        activation_function="gelu",
        id2label={0: "no", 1: "perhaps", 2: "yes"},
        label2id={"no": 0, "perhaps": 1, "yes": 2},
        problem_type="multi_label_classification",
        tie_word_embeddings=False,
        architectures=["OPTForSequenceClassification"],
        something_unknown={"deep": [1, None, "é"]},
    )
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written.pop("dtype", None)
    written[dtype_name] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(written))

    ours = OPTConfig.from_json(tmp_path / "config.json")
    assert (ours.hidden_size, ours.word_embed_proj_dim, ours.num_labels) == (24, 6, 3)
    assert ours.problem_type == "multi_label_classification" and not ours.tie_word_embeddings
    back = json.loads(ours.to_json())
    assert written.items() <= back.items()

    ours.to_json(tmp_path / "config.json")
    again = transformers.OPTConfig.from_pretrained(tmp_path)
    assert again.id2label == theirs.id2label and again.label2id == theirs.label2id
    assert str(again.dtype).endswith("float16")
    assert again.something_unknown == theirs.something_unknown
    for field in _hf_fields():
        assert getattr(again, field) == getattr(theirs, field), field


def test_labels_follow_num_labels(tmp_path):
    config = OPTConfig.from_dict({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}})
    assert config.num_labels == 3
    config.replace(num_labels=5).to_json(tmp_path)
    assert transformers.OPTConfig.from_pretrained(tmp_path).num_labels == 5
    assert OPTConfig.from_json(tmp_path).num_labels == 5


@pytest.mark.parametrize(
    "fields", [{"id2label": None}, {"num_labels": None}, {"id2label": {"0": "a"}, "label2id": None}]
)
def test_labels_may_be_null(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "num_labels": None} | fields))
    theirs = transformers.OPTConfig.from_pretrained(tmp_path).num_labels
    config = OPTConfig.from_json(tmp_path)
    assert config.num_labels == theirs
    config.to_json(tmp_path)
    assert transformers.OPTConfig.from_pretrained(tmp_path).num_labels == theirs
    assert OPTConfig.from_json(tmp_path) == config


def test_json_sources(tmp_path):
    config = OPTConfig(hidden_size=24, num_attention_heads=2, eos_token_id=[2, 50118], pad_token_id=None)
    assert config.eos_token_id == (2, 50118)
    text = config.to_json(tmp_path / "some.json")
    assert OPTConfig.from_json(text) == OPTConfig.from_json(tmp_path / "some.json") == config
    assert OPTConfig.from_json(str(tmp_path / "some.json")) == config
    with pytest.raises(FileNotFoundError, match=r"no config\.json at .*absent"):
        OPTConfig.from_json(tmp_path / "absent")
    for bad, message in {
        "{": "not JSON",
        "[1]": "should hold a JSON object, but holds a list",
        '{"model_type": "llama"}': "'llama' model",
        '{"hidden_size": "768"}': "hidden_size should be a positive integer, not '768'",
        "[" * 100_000: "not JSON",
    }.items():
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(ValueError, match=message):
            OPTConfig.from_json(tmp_path)


def test_equality_hash_copy_and_pickle():
    config = OPTConfig.from_dict({"hidden_size": 24, "num_attention_heads": 2, "note": [1, 2]})
    plain = OPTConfig(hidden_size=24, num_attention_heads=2)
    assert config == plain and hash(config) == hash(plain)
    assert config != plain.replace(dropout=0.2)
    for other in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and hash(other) == hash(config) and other.extra == config.extra
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_replace_takes_the_embedding_along():
    assert OPTConfig().replace(hidden_size=24).word_embed_proj_dim == 24
    assert OPTConfig(word_embed_proj_dim=512).replace(hidden_size=24).word_embed_proj_dim == 512
    assert OPTConfig().replace(hidden_size=24, word_embed_proj_dim=8).word_embed_proj_dim == 8


IMPOSSIBLE = [
    ("vocab_size", 0),
    ("hidden_size", 7.5),
    ("hidden_size", 100),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", True),
    ("ffn_dim", "4"),
    ("max_position_embeddings", None),
    ("num_attention_heads", 0),
    ("word_embed_proj_dim", -5),
    ("num_labels", 0),
    ("dropout", 1.0),
    ("dropout", float("nan")),
    ("attention_dropout", -0.1),
    ("layerdrop", "0.1"),
    ("init_std", -1.0),
    ("init_std", float("nan")),
    ("do_layer_norm_before", 1),
    ("_remove_final_layer_norm", None),
    ("use_cache", "yes"),
    ("enable_bias", 0),
    ("layer_norm_elementwise_affine", "no"),
    ("tie_word_embeddings", 2),
    ("activation_function", "relu6"),
    ("problem_type", "ranking"),
    ("pad_token_id", 1.5),
    ("bos_token_id", "2"),
    ("eos_token_id", [2, "3"]),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_values(name, value):
    with pytest.raises(ValueError, match=name):
        OPTConfig(**{name: value})


def test_all_impossible_values_are_named_at_once():
    bad = dict(reversed(IMPOSSIBLE))
    with pytest.raises(ValueError) as caught:
        OPTConfig(**bad)
    assert [name for name in bad if name not in str(caught.value)] == []


def test_unknown_preset_and_field():
    with pytest.raises(ValueError, match="no preset named 'opt-1b'; there are: opt-125m, "):
        OPTConfig.preset("opt-1b")
    assert OPTConfig.preset("facebook/opt-125m", dropout=0.0) == OPTConfig.preset("opt-125m").replace(dropout=0.0)
    with pytest.raises(TypeError, match="hiden_size"):
        OPTConfig(hiden_size=3)  # pyright: ignore[reportCallIssue]
