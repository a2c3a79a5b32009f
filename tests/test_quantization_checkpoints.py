"""Quantized while loading, saved and loaded, spread over devices: always the codes that `optjax.quantize` gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_helpers import POST_NORM, PRE_NORM, make_params

import optjax
from optjax import Quantization
from optjax.checkpoints import CheckpointError, load_params, save_params, tensors
from optjax.checkpoints.open import open_checkpoint
from optjax.cli import main
from optjax.quantization import quantize as quantizing
from optjax.sharding import make_mesh

PRE, POST = (config.replace(vocab_size=64, hidden_size=32) for config in (PRE_NORM, POST_NORM))
KINDS = [Quantization("int8"), Quantization("int4", 4), Quantization("nf4", 4)]
named = pytest.mark.parametrize("quantization", KINDS, ids=lambda q: q.kind)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@named
@pytest.mark.parametrize("stacked", [False, True])
def test_while_loading_and_back(tmp_path, quantization, stacked):
    config = POST.replace(tie_word_embeddings=stacked)
    params = make_params(config, dtype="float32", stacked=stacked)
    wanted = optjax.quantize(params, quantization)
    save_params(params, tmp_path / "full")
    made = load_params(tmp_path / "full", quantization=quantization, stacked=stacked)
    assert_same(made, wanted)
    save_params(made, tmp_path / "codes", max_shard_size=2000)
    assert_same(load_params(tmp_path / "codes", stacked=stacked), wanted)
    assert_same(load_params(tmp_path / "codes", quantization=quantization, stacked=stacked), wanted)
    entry = json.loads((tmp_path / "codes" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "optjax" and entry["kind"] == quantization.kind
    # In another dtype the codes are the same.
    half = load_params(tmp_path / "full", "bfloat16", quantization=quantization, stacked=stacked)
    assert half.dtype == jnp.bfloat16 and half["embed_positions"]["weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["embed_tokens"]["weight"].values, wanted["embed_tokens"]["weight"].values)
    again = load_params(tmp_path / "codes", "bfloat16", stacked=stacked)
    assert_same(again, half)
    assert again.layer(1)["fc1"]["bias"].dtype == jnp.bfloat16


def test_a_quantized_models_config_serves_another_model(tmp_path):
    save_params(optjax.quantize(make_params(PRE), "int8"), tmp_path / "codes")
    config = optjax.OPTConfig.from_json(tmp_path / "codes")
    params = optjax.init_params(config, jax.random.key(0))
    save_params(params, tmp_path / "full")
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())
    assert_same(load_params(tmp_path / "full"), params)
    # And quantized otherwise.
    save_params(optjax.quantize(params, KINDS[1]), tmp_path / "codes")
    assert load_params(tmp_path / "codes").quantization == KINDS[1]


def test_group_sizes_of_numpy_and_of_int8(tmp_path):
    quantized = optjax.quantize(make_params(PRE), Quantization("int4", np.int64(8)))  # type: ignore[arg-type]
    save_params(quantized, tmp_path)
    assert load_params(tmp_path).quantization == Quantization("int4", 8)
    assert type(Quantization("nf4", np.int64(8)).group_size) is int  # type: ignore[arg-type]
    save_params(optjax.quantize(make_params(PRE), "int8"), tmp_path)
    assert load_params(tmp_path, quantization=Quantization("int8", 32)).quantization == Quantization("int8")


def test_files_without_scales_of_columns(tmp_path):
    """Those written before tables had any are read as they were."""
    wanted = optjax.quantize(make_params(PRE), "int8")
    save_params(wanted, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    [name] = [name for name in tensors if name.endswith("weight_column_scale")]
    assert "embed_tokens" in name
    safetensors.numpy.save_file({key: value for key, value in tensors.items() if key != name}, file)
    table = load_params(tmp_path)["embed_tokens"]["weight"]
    assert table.column_scales is None
    plain = table.values.astype(jnp.float32) * table.scales[:, None]
    np.testing.assert_array_equal(table.dequantize(), plain)


def test_storage_of_a_tpu(tmp_path, monkeypatch):
    """There int4 is jax's own; files are the same."""
    params, quantization = make_params(PRE), Quantization("int4", 4)
    packed = optjax.quantize(params, quantization)
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "platform", lambda placement: "tpu")
        native = optjax.quantize(params, quantization)
    fc1 = native["layers"][0]["fc1"]["weight"]
    assert fc1.values.dtype == jnp.int4 and fc1.native
    np.testing.assert_array_equal(fc1.dequantize(), packed["layers"][0]["fc1"]["weight"].dequantize())
    for name, some in (("packed", packed), ("native", native), ("stacked", optjax.stack_layers(native))):
        save_params(some, tmp_path / name)
    one, *others = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("packed", "native", "stacked")]
    assert [one == other for other in others] == [True, True]
    monkeypatch.setattr(sys.modules["optjax.checkpoints.load"], "platform", lambda placement: "tpu")
    assert_same(load_params(tmp_path / "packed"), native)


@named
@pytest.mark.parametrize("rules", ["fsdp", "fsdp+tensor"])
def test_over_a_mesh(tmp_path, monkeypatch, quantization, rules):
    """The codes of one device, spread as the matrix would be, from full precision and from codes."""
    config = (POST.replace(word_embed_proj_dim=16) if rules == "fsdp" else PRE).replace(num_hidden_layers=1)
    params = make_params(config)
    save_params(params, tmp_path / "full")
    wanted = optjax.quantize(params, quantization)
    mesh = make_mesh("fsdp=4" if rules == "fsdp" else "fsdp=2,tensor=2", jax.devices()[:4])
    spread = load_params(tmp_path / "full", mesh=mesh, rules=rules, quantization=quantization)
    abstract = optjax.quantize(optjax.abstract_params(spread.config, "float32", mesh=mesh, rules=rules), quantization)
    for one, many, like in zip(*map(jax.tree.leaves, (wanted, spread, abstract)), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(many, np.float32))
        assert many.sharding.is_equivalent_to(like.sharding, many.ndim)
    fc1 = spread["layers"][0]["fc1"]["weight"]
    assert len({str(shard.index) for shard in fc1.values.addressable_shards}) == 4
    save_params(spread, tmp_path / "codes")
    read, original = [], tensors.FileTensor.read

    def noted(self, index=()):
        read.append((self.offset, str(index)))
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(tensors.FileTensor, "read", noted)
        again = load_params(tmp_path / "codes", mesh=mesh, rules=rules)
    assert len(read) == len(set(read))
    assert_same(again, spread)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(spread), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@named
def test_eight_devices_compute_what_one_does(quantization, no_digits):
    # Several CPUs multiply in float32. One would have int8 codes, which tables are of every kind, in digits.
    mesh = make_mesh("fsdp=2,sequence=2,tensor=2", jax.devices()[:8])
    config = PRE.replace(num_hidden_layers=1, max_position_embeddings=16)
    alone = optjax.quantize(optjax.init_params(config.replace(init_std=0.3), jax.random.key(0)), quantization)
    params = optjax.init_params(config.replace(init_std=0.3), jax.random.key(0), mesh=mesh)
    spread = optjax.quantize(params, quantization)
    ids = np.random.default_rng(0).integers(0, 64, size=(4, 8))
    found, wanted = (optjax.causal_lm(params, ids).logits for params in (spread, alone))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    made = [optjax.generate(params, ids, max_new_tokens=4, eos_token_id=[]) for params in (spread, alone)]
    np.testing.assert_array_equal(*made)


def test_convert_writes_what_save_params_writes(tmp_path, capsys):
    save_params(make_params(PRE, dtype="bfloat16"), tmp_path / "full")
    options = ["--quantize", "nf4", "--group-size", "8"]
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "codes"), *options]) == 0
    save_params(load_params(tmp_path / "full", quantization=Quantization("nf4", 8)), tmp_path / "same")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("codes", "same")]
    assert files[0] == files[1]
    # Quantized checkpoints pass through; into a format without codes they do not.
    assert main(["convert", str(tmp_path / "codes"), str(tmp_path / "copy"), "-q"]) == 0
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == files[0]
    assert main(["info", str(tmp_path / "codes")]) == 0
    out = capsys.readouterr()
    assert "nf4 in groups of 8" in out.out and "parameters in nf4 from safetensors" in out.err
    for arguments, message in [
        (["codes", "x", "--format", "flax"], "quantized to nf4, which --format flax cannot hold; leave --format"),
        (["full", "x", "--format", "flax", "--quantize", "int8"], "cannot hold quantized weights"),
        (["codes", "x", "--quantize", "int8"], "quantized already"),
        (["full", "x", "--group-size", "8"], "--group-size is for"),
        (["full", "x", "--quantize", "int4", "--group-size", "7"], "even number"),
    ]:
        source, dest, *rest = arguments
        assert main(["convert", str(tmp_path / source), str(tmp_path / dest), *rest]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / dest).exists()


def test_generate_from_the_command_line(capsys):
    assert main(["generate", "--quantize", "int8", "--greedy", "-n", "3", "--no-compile-cache", "The"]) == 0
    assert "int8 for float32" in capsys.readouterr().err


def test_errors(tmp_path):
    quantized = optjax.quantize(make_params(PRE), Quantization("int4", 8))
    save_params(quantized, tmp_path)
    with pytest.raises(ValueError, match="flax files cannot hold weights quantized to int4"):
        save_params(quantized, tmp_path / "flax", "flax")
    with pytest.raises(ValueError, match="is quantized as .*int4.*; load it without quantization="):
        load_params(tmp_path, quantization="int8")
    with pytest.raises(ValueError, match="no quantization 'int9'"):
        load_params(tmp_path, quantization="int9")
    mesh = make_mesh("tensor=2", jax.devices()[:2])
    save_params(make_params(PRE), tmp_path / "full")
    with pytest.raises(ValueError, match="whole groups of 64; choose a group_size that divides 16"):
        load_params(tmp_path / "full", mesh=mesh, rules="tensor", quantization="int4")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"quant_method": "gptq"}, "quantized by 'gptq', which optjax does not read"),
        ({"kind": "int3"}, "no quantization 'int3'"),
        ({"group_size": "8"}, "group_size should be"),
        ({"kind": "int8"}, "by its quantization"),
        ({"group_size": 16}, r"fc1.weight_scale: .* by its quantization"),
    ]:
        path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
        with pytest.raises(CheckpointError, match=message):
            load_params(tmp_path)
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(CheckpointError, match="not floating point"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_peak_memory(tmp_path):
    """Loading holds the codes and about one tensor in full precision."""
    config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=4, vocab_size=8000)
    rng = np.random.default_rng(0)
    one = rng.standard_normal(4 * config.hidden_size**2, dtype=np.float32)

    def leaf(weight, _):
        return np.resize(one, weight.shape)

    save_params(optjax.params.build_params(config, "causal_lm", leaf), tmp_path)
    program = """
import sys, jax, optjax
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
optjax.load_params("opt-mini", quantization=sys.argv[2])
before = peak()
params = optjax.load_params(sys.argv[1], quantization=sys.argv[2])
print(peak() - before, sum(w.nbytes for w in jax.tree.leaves(params)))
"""
    full = 4 * optjax.count_params(config)
    for kind in ("int8", "nf4"):
        run = [sys.executable, "-c", program, str(tmp_path), kind]
        done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
        assert done.returncode == 0, done.stderr[-3000:]
        peak, size = map(int, done.stdout.split())
        assert size < 0.3 * full
        assert peak <= 1.1 * size + 4 * one.nbytes, f"{kind}: {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of codes"
