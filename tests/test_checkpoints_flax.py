"""Flax msgpack, from FlaxOPT and to it."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from checkpoint_helpers import (
    CONFIGS,
    POST_NORM,
    PRE_NORM,
    assert_equal_params,
    assert_same,
    make_params,
    make_state,
    write_config,
)
from hf_models import hf_config

from optjax import load_params, save_params
from optjax.checkpoints import flax_writer
from optjax.checkpoints.flax_reader import read_flax

MODELS = {"causal_lm": transformers.FlaxOPTForCausalLM, None: transformers.FlaxOPTModel}


def make_model(config, head, dtype="float32"):
    model = copy.copy(initialized(config, head))
    model.params = jax.tree.map(lambda w: w.astype(dtype), model.params)
    return model


@functools.cache
def initialized(config, head):
    return MODELS[head](hf_config(config), seed=3)


def state_of_flax(model) -> dict[str, np.ndarray]:
    """By our names, matrices ``[out, in]``."""
    out = {}
    for path, value in flax.traverse_util.flatten_dict(model.params).items():
        steps = path[1:] if path[0] == "model" else path
        *steps, last = steps[1:] if steps[0] == "decoder" else steps
        array = np.asarray(value)
        name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(last, last)
        out[".".join([*steps, name])] = array.T if last == "kernel" else array
    return out


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("head", MODELS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_from_flax_and_back(tmp_path, shard, head, config):
    model = make_model(config, head)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / "flax_model.msgpack.index.json").exists() == (shard == "10KB")
    params = load_params(tmp_path / "theirs")
    assert params.head == head
    assert_same(params, state_of_flax(model))

    save_params(params, tmp_path / "ours", "flax", max_shard_size=shard)
    assert (tmp_path / "ours" / "flax_model.msgpack.index.json").exists() == (shard == "10KB")
    again = MODELS[head].from_pretrained(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_dtypes(tmp_path, dtype):
    model = make_model(POST_NORM, "causal_lm", dtype)
    model.save_pretrained(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs")
    assert params.dtype == jnp.dtype(dtype)
    assert_same(params, state_of_flax(model))
    save_params(params, tmp_path / "ours", "flax")
    mine, theirs = ((tmp_path / w / "flax_model.msgpack").read_bytes() for w in ("ours", "theirs"))
    jax.tree.map(
        np.testing.assert_array_equal,
        flax.serialization.msgpack_restore(mine),
        flax.serialization.msgpack_restore(theirs),
    )


def test_untied_head(tmp_path):
    config = PRE_NORM.replace(tie_word_embeddings=False)
    model = make_model(config, "causal_lm")
    assert model.params["lm_head"]["kernel"].shape == (24, 61)
    model.save_pretrained(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs")
    assert_same(params, state_of_flax(model))
    save_params(params, tmp_path / "ours", "flax")
    jax.tree.map(
        np.testing.assert_array_equal,
        transformers.FlaxOPTForCausalLM.from_pretrained(tmp_path / "ours").params,
        model.params,
    )


@pytest.mark.parametrize("chunk", [1000, 1001])
def test_chunked_arrays(tmp_path, monkeypatch, chunk):
    """Arrays above 2^30 bytes stand in chunks; here above 1,000."""
    params = make_params(PRE_NORM, dtype="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
        model = make_model(PRE_NORM, "causal_lm")
        model.save_pretrained(tmp_path / "theirs")
        patch.setattr(flax_writer, "MAX_CHUNK", chunk)
        save_params(params, tmp_path / "ours", "flax")
    for folder in ("theirs", "ours"):
        data = (tmp_path / folder / "flax_model.msgpack").read_bytes()
        assert data.count(b"__msgpack_chunked_array__") > 10
    assert_same(load_params(tmp_path / "theirs"), state_of_flax(model))
    assert_equal_params(load_params(tmp_path / "ours"), params)
    restored = flax.serialization.msgpack_restore((tmp_path / "ours" / "flax_model.msgpack").read_bytes())
    kernel = restored["model"]["decoder"]["layers"]["1"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel.T, np.asarray(params["layers"][1]["fc1"]["weight"]))


def test_blocks_of_tensors(tmp_path):
    """What sharded loading asks for: any block of a transposed or chunked array, without the rest."""
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    tree = {"a": {"kernel": array}, "b": flax.serialization._chunk(array)}
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    tensors = read_flax(Path(tmp_path / "x.msgpack"))
    for rows in (slice(0, 6), slice(2, 5), slice(3, 3)):
        for columns in (slice(0, 10), slice(4, 9)):
            for tensor in tensors.values():
                np.testing.assert_array_equal(tensor.read((rows, columns)), array[rows, columns])


def test_flat_names_in_files(tmp_path):
    """Shards may name their arrays by joined paths."""
    state = make_state(PRE_NORM)
    arrays = {}
    for name, tensor in state.items():
        *steps, last = name.split(".")
        norm, embedding = "norm" in name, "embed" in name
        last = last if last == "bias" else "scale" if norm else "embedding" if embedding else "kernel"
        arrays["/".join(["model", "decoder", *steps, last])] = tensor.numpy().T if last == "kernel" else tensor.numpy()
    write_config(PRE_NORM, tmp_path)
    names = list(arrays)
    for i in (0, 1):
        part = {name: arrays[name] for name in names[i::2]}
        (tmp_path / f"flax_model-{i}.msgpack").write_bytes(flax.serialization.msgpack_serialize(part))
    places = {name: f"flax_model-{i}.msgpack" for i in (0, 1) for name in names[i::2]}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(load_params(tmp_path), {n: w.numpy() for n, w in state.items()})


@pytest.mark.parametrize("head", MODELS)
def test_safetensors_with_flax_names(tmp_path, head):
    """What FlaxOPT writes under safe_serialization: kernels, in a safetensors file."""
    model = make_model(POST_NORM, head)
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert (tmp_path / "model.safetensors").exists()
    assert_same(load_params(tmp_path), state_of_flax(model))
