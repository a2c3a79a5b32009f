"""What save_params writes: transformers loads it, bit for bit, and a failure harms nothing."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import safetensors
import torch
from checkpoint_helpers import (
    CONFIGS,
    POST_NORM,
    PRE_NORM,
    assert_equal_params,
    assert_same,
    load_with_transformers,
    make_params,
    make_state,
    prefixed,
    write_config,
)
from hf_models import CLASSES

import optjax
from optjax import load_params, save_params
from optjax.checkpoints import entries
from optjax.checkpoints.save import parse_size, save_over


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["5GB", "15KB"])
def test_transformers_loads_it(tmp_path, head, dtype, shard):
    config = POST_NORM.replace(num_labels=5)
    params = make_params(config, head, dtype, stacked=shard == "15KB")
    save_params(params, tmp_path, max_shard_size=shard)
    model = load_with_transformers(tmp_path, head)
    assert str(model.dtype) == f"torch.{dtype}"
    state = {name.split("decoder.")[-1]: w for name, w in model.named_parameters()}
    assert_same(params, state)
    assert_same(load_params(tmp_path), state)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"enable_bias": False, "activation_function": "gelu"},
        {"_remove_final_layer_norm": True},
        {"eos_token_id": (2, 5), "pad_token_id": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_transformers_loads_every_switch(tmp_path, changes):
    config = dataclasses.replace(PRE_NORM, **changes)
    params = make_params(config)
    save_params(params, tmp_path)
    model = load_with_transformers(tmp_path)
    assert_same(params, {name.split("decoder.")[-1]: w for name, w in model.named_parameters()})
    for name, value in changes.items():
        assert getattr(model.config, name) == (list(value) if isinstance(value, tuple) else value)
    assert_equal_params(load_params(tmp_path), params)


@pytest.mark.parametrize("format", ["safetensors", "flax"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(tmp_path, format, stacked, config):
    for head in CLASSES:
        params = make_params(config, head, "bfloat16", stacked=stacked)
        save_params(params, tmp_path / str(head), format, max_shard_size=20_000)
        assert_equal_params(load_params(tmp_path / str(head), stacked=stacked), params)


def test_norms_without_weights(tmp_path):
    """transformers cannot build such a model, but a checkpoint of one comes back."""
    config = PRE_NORM.replace(layer_norm_elementwise_affine=False)
    params = make_params(config)
    save_params(params, tmp_path)
    assert_equal_params(load_params(tmp_path), params)


def test_the_config_keeps_what_it_does_not_know(tmp_path):
    source = write_config(
        PRE_NORM, tmp_path / "in", "sequence_classification", prefix="</s>", id2label={"0": "bad", "1": "good"}
    )
    torch.save(prefixed(make_state(PRE_NORM, "sequence_classification"), "decoder."), source / "pytorch_model.bin")
    save_params(load_params(source, dtype="bfloat16", head="base"), tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["prefix"] == "</s>" and fields["id2label"] == {"0": "bad", "1": "good"}
    assert fields["architectures"] == ["OPTModel"]
    assert fields["torch_dtype"] == "bfloat16" and "dtype" not in fields
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


def test_files_are_as_the_safetensors_library_wants_them(tmp_path):
    params = make_params(PRE_NORM, dtype="float16")
    save_params(params, tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert_same(params, {name.removeprefix("model.decoder."): array for name, array in stored.items()})
    data = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_shards_and_index(tmp_path):
    params = make_params(PRE_NORM)
    save_params(params, tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    count = optjax.count_params(PRE_NORM)
    assert index["metadata"]["total_size"] == 4 * count
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(p.name for p in tmp_path.glob("model-*")) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = []
    for name in files:
        with safetensors.safe_open(tmp_path / name, "np") as file:
            arrays = [file.get_tensor(n) for n in file.keys()]  # noqa: SIM118
            assert all(index["weight_map"][n] == name for n in file.keys())  # noqa: SIM118
        sizes.append(sum(a.nbytes for a in arrays))
        assert sizes[-1] <= 12_000 or len(arrays) == 1
    assert sum(sizes) == 4 * count
    assert not (tmp_path / "model.safetensors").exists()


def test_size_texts():
    for text, size in [("5GB", 5 * 10**9), ("2 MiB", 2**21), ("10kb", 10_000), (77, 77), ("123", 123), ("1GIB", 2**30)]:
        assert parse_size(text) == size
    for text in ("", "0", "-1GB", "5TBs", "GB", 1.5, True, None):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["safetensors", "flax"])
@pytest.mark.parametrize("shard", [10**9, 12_000])
def test_a_failure_leaves_the_old_checkpoint(tmp_path, monkeypatch, format, shard):
    old, new = (make_params(PRE_NORM, seed=i) for i in (0, 1))
    save_params(old, tmp_path, format, max_shard_size=shard)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    left = [20]

    def fails_midway(array):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no space left on device")
        return np.asarray(array)

    monkeypatch.setattr(entries, "to_host", fails_midway)
    with pytest.raises(OSError, match="no space left"):
        save_params(new, tmp_path, format, max_shard_size=shard)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert_equal_params(load_params(tmp_path), old)


@pytest.mark.parametrize("format", ["safetensors", "flax"])
def test_saving_again_replaces_the_old_checkpoint(tmp_path, format):
    old, new = (make_params(PRE_NORM, seed=i) for i in (0, 1))
    (tmp_path / "tokenizer.json").write_text("{}")
    for first, second in [(12_000, 10**9), (10**9, 12_000), (12_000, 9_000)]:
        save_params(old, tmp_path, format, max_shard_size=first)
        save_params(new, tmp_path, format, max_shard_size=second)
        assert_equal_params(load_params(tmp_path), new)
        shards = [p for p in tmp_path.iterdir() if "-of-" in p.name]
        assert bool(shards) == (second < 10**9)
        assert len({p.name.split("-of-")[1] for p in shards}) <= 1
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_weights_beside_those_that_would_be_loaded_are_not_written(tmp_path):
    old, new = (make_params(PRE_NORM, seed=i) for i in (0, 1))
    save_params(old, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="has model.safetensors, which would be loaded rather than weights in flax's"):
        save_params(new, tmp_path, "flax")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_equal_params(load_params(tmp_path), old)
    (tmp_path / "model.safetensors").unlink()
    save_params(new, tmp_path, "flax")
    assert_equal_params(load_params(tmp_path), new)


@pytest.mark.parametrize("shard", [12_000, 10**9])
def test_a_model_is_replaced_whatever_its_format(tmp_path, shard):
    """Weights that would be read rather than those just written go, and only once these are there."""
    old, new = (make_params(PRE_NORM, seed=i) for i in (0, 1))
    other = make_params(PRE_NORM.replace(ffn_dim=20))
    (tmp_path / "pytorch_model.bin").write_bytes(b"an older model")
    (tmp_path / "tf_model.h5").write_bytes(b"no matter")
    save_params(old, tmp_path, max_shard_size=shard)
    for params in (new, other):
        save_over(params, tmp_path, "flax", shard)
        assert_equal_params(load_params(tmp_path), params)
    assert not [*tmp_path.glob("*safetensors*"), *tmp_path.glob("*.bin")] and (tmp_path / "tf_model.h5").exists()
    save_params(old, tmp_path, max_shard_size=shard)
    assert_equal_params(load_params(tmp_path), old)


def test_a_failure_leaves_the_old_checkpoint_of_another_format(tmp_path, monkeypatch):
    old, new = (make_params(PRE_NORM, seed=i) for i in (0, 1))
    save_params(old, tmp_path, max_shard_size=12_000)
    replace, seen = os.replace, []

    def look_before(source, target):
        seen.append(target)
        assert_equal_params(load_params(tmp_path), old)
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_before)
    save_over(new, tmp_path, "flax", 12_000)
    monkeypatch.undo()
    assert len(seen) > 5
    assert_equal_params(load_params(tmp_path), new)


def test_one_tensor_on_the_host_at_a_time(tmp_path, monkeypatch):
    """Each tensor is asked for once, when the one before it has been written."""
    params = make_params(PRE_NORM)
    events = []
    inner, write = entries.to_host, entries.Entry.raw
    monkeypatch.setattr(entries, "to_host", lambda a: events.append("read") or inner(a))
    monkeypatch.setattr(entries.Entry, "raw", lambda entry: write(entry) if events.append("write") is None else None)
    save_params(params, tmp_path)
    assert events == ["write", "read"] * len(jax.tree.leaves(params))


@pytest.mark.gpu
def test_no_array_keeps_its_copy_on_the_host(tmp_path):
    """A jax array on a device keeps the copy that numpy asked for; saving leaves none behind."""
    params = make_params(PRE_NORM)
    np.asarray(params["embed_tokens"]["weight"])
    save_params(params, tmp_path)
    assert [leaf._npy_value is None for leaf in jax.tree.leaves(params)].count(False) == 1


@pytest.mark.parametrize("format", ["safetensors", "flax"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_numpy_leaves_are_saved_too(tmp_path, format, dtype):
    params = make_params(PRE_NORM)
    save_params(jax.tree.map(lambda w: np.asarray(w).astype(dtype), params), tmp_path, format)
    assert_equal_params(load_params(tmp_path), params)


def test_what_cannot_be_saved(tmp_path):
    params = make_params(PRE_NORM)
    with pytest.raises(ValueError, match="no format 'torch'"):
        save_params(params, tmp_path, "torch")
    with pytest.raises(ValueError, match="folder should be a path, not None"):
        save_params(params, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no array of values"):
        save_params(optjax.abstract_params(PRE_NORM), tmp_path)
    with pytest.raises(ValueError, match="should be what init_params"):
        save_params(params.weights, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="should have shape"):
        save_params(dataclasses.replace(params, config=PRE_NORM.replace(ffn_dim=39)), tmp_path)
    with pytest.raises(ValueError, match="is int8"):
        save_params(jax.tree.map(lambda w: w.astype("int8"), params), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_params(params, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
