"""Alpa's and FlexGen's folders: one array of numpy.save a file."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_helpers import CONFIGS, DTYPES, PRE_NORM, assert_same, make_state, write_config

from optjax import OPTConfig, load_params
from optjax.checkpoints import CheckpointError


def write_folder(state, folder, suffix, copies=True):
    folder.mkdir(exist_ok=True)
    for name, tensor in state.items():
        name = name.replace("final_layer_norm", "layer_norm") if name.startswith("final") else name
        array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        with open(folder / f"decoder.{name}{suffix}", "wb") as file:
            np.save(file, array)
    if copies:  # FlexGen has the head as a copy of the embedding; metaseq's version counter comes along.
        with open(folder / f"lm_head.weight{suffix}", "wb") as file:
            np.save(file, state["embed_tokens.weight"])
        with open(folder / f"decoder.version{suffix}", "wb") as file:
            np.save(file, np.float32([3]))
    return folder


@pytest.mark.parametrize("suffix", ["", ".npy"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bit_for_bit(tmp_path, suffix, dtype, config):
    state = make_state(config, dtype=DTYPES[dtype])
    write_folder(state, tmp_path, suffix)
    write_config(config, tmp_path)
    (tmp_path / "README").write_text("not an array")
    assert_same(load_params(tmp_path), state)


def test_bfloat16_float64_and_column_order(tmp_path):
    state = {name: w.numpy().astype(jnp.bfloat16) for name, w in make_state(PRE_NORM).items()}
    write_folder(state, tmp_path, "", copies=False)
    write_config(PRE_NORM, tmp_path)
    assert_same(load_params(tmp_path), state)
    doubles = {name: np.asfortranarray(w.double().numpy() + 1e-9) for name, w in make_state(PRE_NORM).items()}
    assert doubles["layers.0.fc1.weight"].flags.f_contiguous
    write_folder(doubles, tmp_path, "")
    assert_same(load_params(tmp_path), {name: w.astype(np.float32) for name, w in doubles.items()})


def test_a_published_size_needs_no_config(tmp_path):
    config = OPTConfig.preset("opt-125m", vocab_size=8, max_position_embeddings=4, ffn_dim=8)
    state = make_state(config, dtype=torch.float16)
    params = load_params(write_folder(state, tmp_path / "a", ""))
    assert params.config == config
    assert_same(params, state)
    write_folder(make_state(PRE_NORM), tmp_path / "b", "")
    with pytest.raises(CheckpointError, match="pass config="):
        load_params(tmp_path / "b")


def test_arrays_of_objects_are_refused(tmp_path):
    """numpy keeps those as pickles."""
    write_folder(make_state(PRE_NORM), write_config(PRE_NORM, tmp_path), "")
    with open(tmp_path / "decoder.layers.0.fc1.bias", "wb") as file:
        np.save(file, np.array([print] * 40, object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="no array of numbers"):
        load_params(tmp_path)
