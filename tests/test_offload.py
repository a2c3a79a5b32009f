"""Models whose layers lie in the host's memory or on disk: the same ids, and memory for a few layers only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_helpers import EOS, assert_same_tokens, hf_generate, make_pair, pad, random_prompts
from tpu_compiler import ask

import optjax
from optjax import OPTConfig, count_params

N = 8
CONFIG = OPTConfig(
    vocab_size=47, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40, max_position_embeddings=64
)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A torch model, its params and their folder, prompts of many lengths, padded anywhere."""
    model, params = make_pair(CONFIG)
    folder = tmp_path_factory.mktemp("random")
    optjax.save_params(params, folder)
    rng = np.random.default_rng(0)
    prompts = random_prompts(rng, 40, CONFIG.vocab_size, 12)
    return model, params, folder, prompts, *pad(prompts, "holes", rng, CONFIG.vocab_size)


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_greedy_ids_are_those_of_transformers(case, offload):
    model, _, folder, prompts, ids, mask = case
    params = optjax.load_params(folder, offload=offload)
    made = optjax.generate(params, ids, mask, max_new_tokens=N, eos_token_id=EOS)
    assert_same_tokens(np.asarray(made)[:, ids.shape[1] :], hf_generate(model, prompts, N, eos_token_id=EOS))


@pytest.mark.parametrize(
    ("offload", "kind"), [("host", "nf4"), ("host", "int8"), ("disk", "int8"), ("disk", "int4"), ("disk", None)]
)
def test_other_functions_give_what_whole_params_give(case, tmp_path, offload, kind):
    """Logits without a cache, quantized or not; and from disk the ids of beams."""
    _, whole, folder, _, ids, mask = case
    ids, mask = ids[:4], mask[:4]
    if kind is not None:
        whole = optjax.quantize(whole, kind)
        optjax.save_params(whole, folder := tmp_path)
    params = optjax.load_params(folder, offload=offload)
    assert params.quantization == whole.quantization and params.dtype == whole.dtype
    ours, theirs = (optjax.causal_lm(each, ids, attention_mask=mask).logits for each in (params, whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if kind in (None, "int8"):
        options = dict(max_new_tokens=4, num_beams=3)
        expected = optjax.generate(whole, ids, mask, **options)
        np.testing.assert_array_equal(optjax.generate(params, ids, mask, **options), expected)


def test_layers_of_several_dtypes(case, tmp_path):
    """As stacking them gives: one dtype that holds those of all layers, and nothing rounded."""
    from safetensors.numpy import load_file, save_file

    _, _, folder, _, ids, mask = case
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    narrow = {name: t.astype(jnp.bfloat16) if "layers.0." in name else t for name, t in tensors.items()}
    save_file(narrow, tmp_path / "model.safetensors", {"format": "pt"})
    whole = optjax.load_params(tmp_path)
    assert {str(w.dtype) for w in jax.tree.leaves(whole["layers"])} == {"float32", "bfloat16"}
    expected = optjax.causal_lm(whole, ids, attention_mask=mask).logits
    for options in ({"stacked": True}, {"offload": "host"}, {"offload": "disk"}):
        params = optjax.load_params(tmp_path, **options)
        np.testing.assert_allclose(optjax.causal_lm(params, ids, attention_mask=mask).logits, expected, atol=1e-5)
    stacked, like = optjax.load_params(tmp_path, stacked=True), optjax.stack_layers(whole)
    assert jax.tree.map(lambda w: w.dtype, stacked) == jax.tree.map(lambda w: w.dtype, like)


def test_from_a_relative_path(case, monkeypatch):
    """Files are found again from another folder."""
    _, whole, folder, _, ids, mask = case
    monkeypatch.chdir(folder.parent)
    params = optjax.load_params(folder.name, offload="disk")
    monkeypatch.chdir("/")
    ours, theirs = (optjax.causal_lm(each, ids, attention_mask=mask).logits for each in (params, whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_over_a_mesh(case):
    from optjax.sharding import make_mesh

    _, whole, folder, _, ids, mask = case
    params = optjax.load_params(folder, mesh=make_mesh("fsdp=8"), offload="host")
    assert params["layers"]["fc1"]["weight"].sharding.memory_kind == "pinned_host"
    ours, theirs = (optjax.causal_lm(each, ids, attention_mask=mask).logits for each in (params, whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_errors_come_before_anything_is_read(case):
    _, whole, folder, *_ = case
    for options, words in (
        (dict(offload="ssd"), "offload should be 'host' or 'disk'"),
        (dict(offload="disk", quantization="int8"), "optjax convert --quantize"),
        (dict(offload="host", stacked=True), "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=words):
            optjax.load_params(folder, **options)
    offloaded = optjax.offload(whole)
    for function in (optjax.offload, optjax.quantize, lambda p: optjax.save_params(p, folder)):
        with pytest.raises(ValueError, match="in the host's memory"):
            function(offloaded)


PROGRAM = """
import json, sys, threading, time
import numpy as np
import optjax
source, thin, offload = sys.argv[1:]
ids, mask = np.array([[5, 6, 7, 8], [0, 0, 9, 4]]), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def generate(source):
    params = optjax.load_params(source, offload=None if offload == "no" else offload)
    return np.asarray(optjax.generate(params, ids, mask, max_new_tokens=4)).tolist()

generate(thin)  # what jax itself and compiling so many layers take
peak, before, done = 0, anonymous(), threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watching = threading.Thread(target=watch)
watching.start()
made = generate(source)
done.set()
watching.join()
print(json.dumps([made, peak - before]))
"""


def test_a_third_of_the_weights_memory_is_enough(tmp_path):
    """570 MB of weights: the process takes less than a third of them, and makes the ids that it makes of them whole."""
    import jax

    large = CONFIG.replace(hidden_size=768, ffn_dim=3072, num_hidden_layers=20, init_std=0.05)
    for name, config in (("large", large), ("thin", large.replace(hidden_size=8, ffn_dim=8))):
        optjax.save_params(optjax.init_params(config, jax.random.key(0)), tmp_path / name)

    def run(offload: str) -> tuple[list, int]:
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "large"), str(tmp_path / "thin"), offload]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # what is freed is given back: what is held is measured
        out = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True).stdout
        return json.loads(out.splitlines()[-1])

    size = 4 * count_params(large)
    (whole, all_of_it), (streamed, some) = run("no"), run("disk")
    assert streamed == whole and len({tuple(row[4:]) for row in whole}) == 2
    assert all_of_it > size > 3 * some, f"{all_of_it / 1e6:.0f} and {some / 1e6:.0f} MB for {size / 1e6:.0f} MB"


@pytest.mark.tpu_compiler
def test_the_tpu_holds_less_than_a_third_of_the_weights():
    """12 layers of OPT-30b (all 48 are alike) on one v5e: two are there at a time, each copied once, asynchronously."""
    found = ask(__file__)
    assert 3 * found["device"] < found["host"]
    assert found["temporary"] < 2.5 * found["layer"]
    assert found["copies started"] == found["copies done"] == 6 * 12


def main() -> None:
    import re

    import jax.numpy as jnp

    from optjax.config import OPTConfig
    from optjax.sharding import make_mesh, make_placement
    from optjax.sharding.plan.devices import devices
    from optjax.sharding.plan.generation import generation_programs
    from optjax.sharding.plan.hardware import parse_topology

    topology, config = parse_topology("v5e:1x1"), OPTConfig.preset("opt-30b").replace(num_hidden_layers=12)
    placement = make_placement(make_mesh("", devices(topology)), None, config, "causal_lm")
    programs = generation_programs(config, placement, batch=2, prompt=16, cache_length=512, offload="host")
    compiled = programs[1].function.lower(*programs[1].arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    layer = 12 * config.hidden_size**2 * jnp.dtype(jnp.bfloat16).itemsize
    device = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    device += memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts = {f"copies {end}": len(re.findall(rf"dynamic-slice-{word}\([^\n]*", text))
              for end, word in (("started", "start"), ("done", "done"))}  # fmt: skip
    found = {"host": memory.host_argument_size_in_bytes, "device": device}
    print(json.dumps(found | {"layer": layer, "temporary": memory.temp_size_in_bytes} | counts))


if __name__ == "__main__":
    main()
