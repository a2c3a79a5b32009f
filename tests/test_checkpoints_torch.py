"""safetensors and .bin files as torch, safetensors and transformers write them: the same bits in the params."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_helpers import (
    CONFIGS,
    DTYPES,
    POST_NORM,
    PRE_NORM,
    assert_same,
    flat,
    make_state,
    prefixed,
    write_config,
)
from hf_models import CLASSES, assert_close, torch_model

import optjax
from optjax import load_params
from optjax.checkpoints import CheckpointError


def write_safetensors(state, path):
    safetensors.torch.save_file({name: w.contiguous() for name, w in state.items()}, path / "model.safetensors")


def write_bin(state, path):
    torch.save(state, path / "pytorch_model.bin")


def write_legacy_bin(state, path):
    torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)


WRITERS = {"safetensors": write_safetensors, "bin": write_bin, "legacy_bin": write_legacy_bin}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bit_for_bit(tmp_path, write, dtype, config):
    state = make_state(config, dtype=DTYPES[dtype])
    write(prefixed(state, "model.decoder."), write_config(config, tmp_path))
    params = load_params(tmp_path)
    assert (params.head, params.config, params.dtype) == ("causal_lm", config, jnp.dtype(dtype))
    assert_same(params, state)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_wrappers_of_training_stand_before_the_head_too(tmp_path, prefix, tied):
    config = PRE_NORM.replace(tie_word_embeddings=tied)
    state = make_state(config)
    head = {"lm_head.weight": state["embed_tokens.weight"]} if tied else {}
    file = prefixed(state, "model.decoder.") | head
    write_bin({prefix + name: w for name, w in file.items()}, write_config(config, tmp_path))
    assert_same(load_params(tmp_path), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
@pytest.mark.parametrize("write", [write_bin, write_legacy_bin])
def test_a_state_dict_beside_other_state(tmp_path, wrapper, write):
    state = make_state(PRE_NORM)
    file = {wrapper: prefixed(state, "model.decoder."), "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    write(file, write_config(PRE_NORM, tmp_path))
    assert_same(load_params(tmp_path), state)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_float64_becomes_float32(tmp_path, write):
    state = make_state(PRE_NORM, dtype=torch.float64)
    state = {name: w + torch.pi * 1e-9 for name, w in state.items()}
    write(prefixed(state, "model.decoder."), write_config(PRE_NORM, tmp_path))
    assert_same(load_params(tmp_path), {name: w.float() for name, w in state.items()})


@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cast(tmp_path, dtype, wanted):
    state = make_state(PRE_NORM, dtype=DTYPES[dtype])
    write_bin(prefixed(state, "model.decoder."), write_config(PRE_NORM, tmp_path))
    assert_same(load_params(tmp_path, dtype=wanted), {name: w.to(DTYPES[wanted]) for name, w in state.items()})


# 350m's file has `decoder.`, 1.3b's `model.decoder.`; conversions have all kinds.
@pytest.mark.parametrize(
    "prefix", ["model.decoder.", "decoder.", "", "model.", "model.model.decoder.", "module.decoder."]
)
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_prefixes(tmp_path, prefix, write):
    state = make_state(POST_NORM)
    write(prefixed(state, prefix), write_config(POST_NORM, tmp_path))
    assert_same(load_params(tmp_path), state)


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "15KB"])
def test_transformers_models(tmp_path, head, safe, shard):
    config = PRE_NORM.replace(num_labels=3)
    model = torch_model(config, head)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=shard)
    assert bool(list(tmp_path.glob("*.index.json"))) == (shard == "15KB")
    params = load_params(tmp_path)
    assert (params.head, params.config) == (head, config)
    assert_same(params, make_state(config, head))
    ids = np.random.default_rng(0).integers(3, config.vocab_size, size=(2, 9))
    function = {None: optjax.forward}.get(head) or getattr(optjax, str(head))
    with torch.no_grad():
        ours, theirs = function(params, ids), model(torch.from_numpy(ids))
    for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
        if hasattr(ours, name):
            assert_close(getattr(ours, name), getattr(theirs, name))


def test_old_and_new_torch_details(tmp_path):
    """Transposed and sliced views, one storage under two names, parameters, metadata, and what is no tensor."""
    state = make_state(PRE_NORM)
    odd: dict = prefixed(state, "decoder.")
    odd["decoder.layers.0.fc1.weight"] = state["layers.0.fc1.weight"].T.contiguous().T
    wide = torch.zeros(3, 80)
    wide[1, 10:50] = state["layers.0.fc1.bias"]
    odd["decoder.layers.0.fc1.bias"] = wide[1, 10:50]
    odd["decoder.layers.1.fc1.weight"] = torch.nn.Parameter(state["layers.1.fc1.weight"])
    both = torch.cat([state["layers.1.fc2.weight"], state["layers.2.fc2.weight"]])
    odd["decoder.layers.1.fc2.weight"], odd["decoder.layers.2.fc2.weight"] = both[:24], both[24:]
    odd["lm_head.weight"] = odd["decoder.embed_tokens.weight"]
    odd["decoder.version"] = torch.tensor([3.0])
    odd["decoder.embed_positions.position_ids"] = torch.arange(5)
    odd["decoder.step"], odd["note"] = 17, {"nested": [1, (2.5, None)]}
    assert not odd["decoder.layers.0.fc1.weight"].is_contiguous()
    write_config(PRE_NORM, tmp_path)
    for write in (write_bin, write_legacy_bin):
        write(odd, tmp_path)
        assert_same(load_params(tmp_path), state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    state = make_state(PRE_NORM)
    torch.save(prefixed(state, ""), tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    assert_same(load_params(write_config(PRE_NORM, tmp_path)), state)


def test_embedding_only_under_the_heads_name(tmp_path):
    """Hugging Face #43159."""
    state = make_state(PRE_NORM)
    file = prefixed(state, "model.decoder.")
    file["lm_head.weight"] = file.pop("model.decoder.embed_tokens.weight")
    write_safetensors(file, write_config(PRE_NORM, tmp_path))
    assert_same(load_params(tmp_path), state)
    assert_same(load_params(tmp_path, head="base"), state)


def test_untied_head(tmp_path):
    config = PRE_NORM.replace(tie_word_embeddings=False)
    state = make_state(config)
    assert "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], state["embed_tokens.weight"])
    write_safetensors(prefixed(state, "model.decoder."), write_config(config, tmp_path))
    assert_same(load_params(tmp_path), state)
    base = {name: w for name, w in state.items() if name != "lm_head.weight"}
    assert_same(load_params(tmp_path, head="base"), base)


def test_layouts_hold_the_same(tmp_path):
    state = make_state(POST_NORM)
    write_bin(prefixed(state, "decoder."), write_config(POST_NORM, tmp_path))
    stacked = load_params(tmp_path, stacked=True)
    assert stacked.stacked and stacked["layers"]["fc1"]["weight"].shape == (3, 40, 24)
    assert_same(stacked, state)


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_head_that_is_not_there(tmp_path, head, stacked):
    config = PRE_NORM.replace(num_labels=3)
    state = make_state(config, dtype=torch.bfloat16)
    write_bin(prefixed(state, "decoder."), write_config(config, tmp_path))
    with pytest.raises(CheckpointError, match="pass key="):
        load_params(tmp_path, head=head)
    params = load_params(tmp_path, head=head, key=jax.random.key(3), stacked=stacked)
    loaded = flat(params)
    created = {name: loaded.pop(name) for name in list(loaded) if name not in state}
    assert sorted(created) == (["score.weight"] if head[0] == "s" else ["qa_outputs.bias", "qa_outputs.weight"])
    assert all(w.dtype == jnp.bfloat16 for w in created.values())
    weight = next(w for name, w in created.items() if name.endswith("weight")).astype(np.float32)
    assert 0.5 * config.init_std < weight.std() < 1.5 * config.init_std
    for name, w in state.items():
        np.testing.assert_array_equal(loaded[name], w.float().numpy().astype(jnp.bfloat16))
    other = flat(load_params(tmp_path, head=head, key=jax.random.key(4)))
    assert not np.array_equal(other[next(n for n in created if n.endswith("weight"))], weight)


def test_the_head_is_that_of_the_folder_whatever_config_is_passed(tmp_path):
    """A classifier's config may be that of the language model that it was made of."""
    write_bin(prefixed(make_state(PRE_NORM), "decoder."), write_config(PRE_NORM, tmp_path / "a"))
    made = optjax.load_params(tmp_path / "a", head="sequence_classification", key=jax.random.key(3))
    assert "architectures" in made.config.to_dict()
    optjax.save_params(made, tmp_path / "b")
    assert load_params(tmp_path / "b", config=made.config).head == "sequence_classification"
    (tmp_path / "b" / "config.json").unlink()
    assert load_params(tmp_path / "b", config=made.config).head == "causal_lm"  # by the only config there is


def test_a_head_that_is_there_but_not_wanted(tmp_path):
    state = make_state(PRE_NORM, "sequence_classification")
    write_safetensors(prefixed(state, "model.decoder."), write_config(PRE_NORM, tmp_path, "sequence_classification"))
    assert load_params(tmp_path).head == "sequence_classification"
    base = {name: w for name, w in state.items() if name != "score.weight"}
    assert_same(load_params(tmp_path, head="causal_lm"), base)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_new_head_in_place_of_the_old(tmp_path, labels):
    """As transformers makes one with ignore_mismatched_sizes, and of the same size too."""
    state = make_state(PRE_NORM, "sequence_classification")
    write_safetensors(prefixed(state, "model.decoder."), write_config(PRE_NORM, tmp_path, "sequence_classification"))
    new = {"config": PRE_NORM.replace(num_labels=labels), "key": jax.random.key(3)}
    if labels != PRE_NORM.num_labels:
        with pytest.raises(CheckpointError, match=r"score.weight: \(2, 24\) in the file(.|\n)*pass new_head=True"):
            load_params(tmp_path, **new)
    loaded = flat(load_params(tmp_path, new_head=True, **new))
    head, old = loaded.pop("score.weight"), state.pop("score.weight")
    assert head.shape == (labels, 24) and not np.array_equal(head, old)
    for name, weight in state.items():
        np.testing.assert_array_equal(loaded[name], weight)


@pytest.mark.parametrize("head", CLASSES)
def test_head_without_architectures(tmp_path, head):
    """Where config.json does not say, the file does; a bare decoder is a language model."""
    write_safetensors(
        prefixed(make_state(PRE_NORM, head), "decoder."), write_config(PRE_NORM, tmp_path, architectures=None)
    )
    assert load_params(tmp_path).head == (head or "causal_lm")


@pytest.mark.parametrize("name", ["FlaxOPTForCausalLM", "TFOPTForCausalLM", "TFOPTModel", "SomebodysOwn"])
def test_other_architectures(tmp_path, name):
    write_safetensors(
        prefixed(make_state(PRE_NORM), ""),
        write_config(PRE_NORM, tmp_path, architectures=[name], quantization_config=None),
    )
    assert load_params(tmp_path).head == (None if name == "TFOPTModel" else "causal_lm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_galactica_with_stored_zeros_and_ones(tmp_path, dtype):
    """Some Galactica files store what their config switches off: accepted where it is without effect."""
    config = PRE_NORM.replace(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu")
    state = make_state(config, dtype=dtype)
    full = make_state(PRE_NORM, dtype=dtype)
    neutral = {n: torch.full_like(w, "norm" in n and n.endswith("weight")) for n, w in full.items() if n not in state}
    assert len(neutral) == 3 * 10 + 2
    write_bin(prefixed(state | neutral, "model.decoder."), write_config(config, tmp_path))
    assert_same(load_params(tmp_path), state)

    neutral["layers.1.fc1.bias"][3] = 1e-3
    neutral["final_layer_norm.weight"][0] = 0.5
    write_bin(prefixed(state | neutral, "model.decoder."), tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path)
    assert "2 unexpected" in str(error.value)
    assert "layers.1.fc1.bias (40,): not all 0, though the config says enable_bias=false" in str(error.value)
    assert "final_layer_norm.weight (24,): not all 1, though" in str(error.value)


def test_safetensors_is_preferred_and_files_can_be_named(tmp_path):
    a, b = make_state(PRE_NORM, seed=1), make_state(PRE_NORM, seed=2)
    write_config(PRE_NORM, tmp_path)
    write_bin(a, tmp_path)
    write_safetensors(b, tmp_path)
    assert_same(load_params(tmp_path), b)
    assert_same(load_params(tmp_path / "pytorch_model.bin"), a)
    assert_same(load_params(str(tmp_path / "model.safetensors")), b)
    (tmp_path / "model.safetensors").rename(tmp_path / "tuned.safetensors")
    assert_same(load_params(tmp_path), a)
    (tmp_path / "pytorch_model.bin").unlink()
    assert_same(load_params(tmp_path), b)


def test_an_index_is_followed_and_can_be_named(tmp_path):
    state = make_state(PRE_NORM)
    names = list(prefixed(state, "model.decoder."))
    file = prefixed(state, "model.decoder.")
    for i in (0, 1):
        torch.save({n: file[n] for n in names[i::2]}, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    places = {n: f"pytorch_model-0000{i + 1}-of-00002.bin" for i in (0, 1) for n in names[i::2]}
    index = write_config(PRE_NORM, tmp_path) / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(load_params(tmp_path), state)
    assert_same(load_params(index), state)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00002.bin"):
        load_params(tmp_path)


@pytest.mark.parametrize("with_config", [True, False])
def test_config_from_the_caller(tmp_path, with_config):
    state = make_state(PRE_NORM)
    write_safetensors(state, tmp_path)
    if with_config:
        write_config(PRE_NORM.replace(num_attention_heads=2), tmp_path)
    params = load_params(tmp_path, config=PRE_NORM)
    assert params.config.num_attention_heads == 4
    assert_same(params, state)


def test_config_from_the_shapes_of_a_published_size(tmp_path):
    """Only shapes matter here, so no weights are made."""
    from optjax.checkpoints.derive import derive_config
    from optjax.checkpoints.match import expected
    from optjax.checkpoints.tensors import FileTensor

    for preset in ("opt-125m", "opt-350m", "opt-1.3b", "galactica-125m", "galactica-1.3b"):
        config = optjax.OPTConfig.preset(preset)
        weights = {path: w.shape for w, _, path in expected(config, None)}
        tensors = {n: FileTensor(tmp_path, 0, shape, np.dtype(np.float16)) for n, shape in weights.items()}
        assert derive_config(tensors) == config, preset  # type: ignore[arg-type]


def test_loaded_weights_can_be_donated(tmp_path):
    """On the CPU they are the very memory the file was read into; a training step may still take them over."""
    state = make_state(PRE_NORM)
    write_safetensors(prefixed(state, "decoder."), write_config(PRE_NORM, tmp_path))
    params = load_params(tmp_path)
    step = jax.jit(lambda p: jax.tree.map(lambda w: w + 1, p), donate_argnums=0)
    assert_same(step(step(params)), {name: w + 1 + 1 for name, w in state.items()})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
