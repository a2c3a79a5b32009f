"""What does not fit is listed, all of it, in one error; and what was asked for in vain is said."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
from checkpoint_helpers import PRE_NORM, assert_same, make_state, prefixed, write_config

from optjax import OPTConfig, load, load_params
from optjax.checkpoints import CheckpointError


def write(state, folder, config=PRE_NORM, **more):
    safetensors.torch.save_file(
        {n: w.contiguous() for n, w in prefixed(state, "model.decoder.").items()}, folder / "model.safetensors"
    )
    return write_config(config, folder, **more)


def test_everything_at_once(tmp_path):
    state = make_state(PRE_NORM)
    del state["layers.0.fc1.weight"], state["final_layer_norm.bias"]
    state["layers.1.fc2.weight"] = torch.zeros(24, 41)
    state["layers.2.self_attn.q_proj.weight"] = torch.zeros(24, 24, dtype=torch.int8)
    state["layers.3.fc1.bias"] = torch.zeros(40)
    state["adapter\x1b[31m"] = torch.zeros(2)
    write(state, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path)
    assert str(error.value).splitlines() == [
        "the checkpoint does not fit its config",
        "2 missing:",
        "  layers.0.fc1.weight (40, 24)",
        "  final_layer_norm.bias (24,)",
        "1 of the wrong shape:",
        "  layers.1.fc2.weight: (24, 41) in the file, (24, 40) by the config",
        "1 not floating point (quantized?):",
        "  layers.2.self_attn.q_proj.weight: int8",
        "2 unexpected:",
        "  adapter?[31m (2,)",
        "  layers.3.fc1.bias (40,)",
    ]


def test_a_long_list_is_cut(tmp_path):
    state = make_state(PRE_NORM)
    write({name: w for name, w in state.items() if "layers." not in name}, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path, config=PRE_NORM.replace(num_hidden_layers=4))
    lines = str(error.value).splitlines()
    assert lines[1] == "64 missing:" and lines[-1] == "  … and 44 more" and len(lines) == 23


def test_too_few_tensors_for_the_layers(tmp_path):
    write(make_state(PRE_NORM), tmp_path)
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000, but there are only 52 tensors"):
        load_params(tmp_path, config=PRE_NORM.replace(num_hidden_layers=1_000_000))


def test_all_biases_missing(tmp_path):
    config = PRE_NORM.replace(enable_bias=False)
    state = make_state(config)
    write(state, tmp_path, PRE_NORM)
    with pytest.raises(CheckpointError, match="enable_bias=false in its config.json"):
        load_params(tmp_path)
    assert_same(load_params(tmp_path, config=config), state)
    write({name: w for name, w in make_state(PRE_NORM).items() if name != "layers.0.fc1.bias"}, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path)
    assert "enable_bias" not in str(error.value)


def test_a_head_that_is_not_opts(tmp_path):
    """What would change the logits, and is not read, is refused; another head's is no matter."""
    state = make_state(PRE_NORM)
    write(state | {"lm_head.bias": torch.zeros(61), "lm_head.weight": state["embed_tokens.weight"] + 1}, tmp_path)
    assert_same(load_params(tmp_path), state)
    write(state | {"lm_head.bias": torch.ones(61)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head.bias \(61,\): not all 0, and OPT has no such bias"):
        load_params(tmp_path)
    assert_same(load_params(tmp_path, head="base"), state)
    write(state | {"lm_head.weight": torch.ones(7, 24)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected:\s+lm_head.weight \(7, 24\)"):
        load_params(tmp_path)
    state = make_state(PRE_NORM, "sequence_classification")
    write(state | {"score.bias": torch.ones(2)}, tmp_path, head="sequence_classification")
    with pytest.raises(CheckpointError, match=r"score.bias \(2,\): not all 0"):
        load_params(tmp_path)


def test_the_same_weight_twice(tmp_path):
    state = make_state(PRE_NORM)
    torch.save(
        prefixed(state, "decoder.") | {"model.decoder.layers.0.fc1.bias": torch.zeros(40)},
        tmp_path / "pytorch_model.bin",
    )
    write_config(PRE_NORM, tmp_path)
    with pytest.raises(CheckpointError, match="model.decoder.layers.0.fc1.bias in pytorch_model.bin is there already"):
        load_params(tmp_path)


def test_another_size(tmp_path):
    """The usual mistake: the config of one model beside the weights of another."""
    write(make_state(PRE_NORM), tmp_path, PRE_NORM.replace(hidden_size=48))
    with pytest.raises(CheckpointError, match="49 of the wrong shape"):
        load_params(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for model.safetensors, model.safetensors.index.json, pytorch"):
        load_params(tmp_path)
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere/at/all", "~/no where"):
        with pytest.raises(FileNotFoundError, match="no file or folder at"):
            load_params(source)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the endings of a checkpoint: .safetensors, .bin"):
        load_params(tmp_path / "model.onnx")


def test_no_config(tmp_path):
    state = make_state(PRE_NORM)
    write(state, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="number of attention heads"):
        load_params(tmp_path)
    write({"score.weight": torch.zeros(2, 24)}, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json: pass config="):
        load_params(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype should be a floating type"),
        ({"dtype": "float33"}, "dtype should be a floating type"),
        ({"dtype": jnp.float8_e5m2}, "dtype should be a floating type"),
        ({"dtype": 5}, "dtype should be a floating type"),
        ({"dtype": "float64"}, "jax_enable_x64"),
        ({"head": "lm"}, "no head named 'lm'; there are"),
        ({"key": 5}, "expected a PRNG key"),
        ({"new_head": True}, "takes a key"),
        ({"new_head": True, "key": jax.random.key(0)}, "this is a language model"),
        ({"rules": {}}, "pass mesh= too"),
        ({"config": "opt-1b"}, "no preset named 'opt-1b'"),
        ({"config": {"hidden_size": 24}}, "config should be an OPTConfig or the name of a preset"),
    ],
)
def test_arguments(tmp_path, arguments, message):
    write(make_state(PRE_NORM), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path, **arguments)


@pytest.mark.parametrize("source", [None, 123, b"x", ["opt-mini"]])
def test_sources_that_are_no_path(source):
    with pytest.raises(ValueError, match="source should be a path or a hub id"):
        load_params(source)


@pytest.mark.parametrize("source", ["a" * 5000, "~nobody-has-this-name/x", "a\0b"])
def test_paths_that_cannot_be(source):
    with pytest.raises(FileNotFoundError, match="no file or folder at"):
        load_params(source)


def test_double_precision(tmp_path):
    """With jax's x64 on, float64 stays."""
    state = make_state(PRE_NORM, dtype=torch.float64)
    write(state, tmp_path)
    with jax.enable_x64(True):
        assert_same(load_params(tmp_path), state)
        assert load_params(tmp_path, dtype="float64").dtype == jnp.float64


def test_load_gives_params_and_tokenizer(tmp_path, shared_data):
    import shutil

    config = PRE_NORM.replace(vocab_size=50272)
    write(make_state(config), tmp_path, config)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "tokenizer" / name, tmp_path)
    params, tokenizer = load(tmp_path, dtype="bfloat16", stacked=True)
    assert params.stacked and params.dtype == jnp.bfloat16
    assert tokenizer.encode("I like you.") == [2, 100, 101, 47, 4]


def test_presets_name_configs(tmp_path):
    """A checkpoint without config.json but of a published shape, by the preset's name."""
    config = OPTConfig.preset("opt-125m", vocab_size=5, ffn_dim=3, max_position_embeddings=2)
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        write(make_state(config), tmp_path)
        load_params(tmp_path, config="opt-125m")


@pytest.mark.parametrize("show", [True, False, None])
def test_progress(tmp_path, capsys, show):
    """A bar where it was asked for; by itself only for large checkpoints, where somebody can see it."""
    write(make_state(PRE_NORM), tmp_path)
    load_params(tmp_path, progress=show)
    out, err = capsys.readouterr()
    assert out == "" and ("loading" in err) == bool(show)
