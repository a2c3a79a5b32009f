"""Decoding as the TPU compiler sees it: two layers of OPT-1.3b's width in bfloat16, for a v5e that is not there.

Needs the libtpu wheel (``pip install 'jax[tpu]'``), and no TPU: nothing is run. Some is for a GPU, by its compiler.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
from tpu_compiler import ask

ROWS, COLUMNS, LAYERS, D = 8, 2048, 2, 2048
BUFFER, IN_HEADS = f"{ROWS},{COLUMNS},{D}", f"{ROWS},32,{COLUMNS},64"
SEARCHES = {"beams": dict(num_beams=4), "contrastive": dict(penalty_alpha=0.6, top_k=4)}


pytestmark = pytest.mark.tpu_compiler


kinds = pytest.mark.parametrize("kind", ["eager", "auto"])


@pytest.fixture(scope="module")
def programs() -> dict:
    return ask(__file__)


@pytest.mark.parametrize("program", ["flat", "flat by a kernel"])
def test_a_step_has_no_temporary_of_the_caches_size(programs, program):
    assert programs[program]["temporary"] < 0.1 * ROWS * COLUMNS * D * 2
    assert programs[program]["kernels"] == (LAYERS if program.endswith("kernel") else 0)


@kinds
def test_the_cache_is_never_copied(programs, kind):
    """In the step, and in the body of generate's loop; moving a buffer into fast memory is no copy."""
    assert programs["flat" if kind == "eager" else "flat by a kernel"]["copies"] == 0
    assert programs[f"loop {kind}"]["copies"] == 0
    assert programs[f"loop {kind}"]["kernels"] == (0 if kind == "eager" else LAYERS)


@kinds
@pytest.mark.parametrize("search", SEARCHES)
def test_no_search_copies_the_cache(programs, search, kind):
    """Beams and candidates are queries of one row, and the flat keys serve them where they lie."""
    assert programs[f"{search} {kind}"]["copies"] == 0
    assert programs[f"{search} {kind}"]["kernels"] == (0 if kind == "eager" else LAYERS)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_an_int8_cache_is_read_as_it_is(programs, chip):
    """No copy in full precision: nothing of a buffer's size is made but by the writes in place; and half the bytes."""
    if f"{chip} int8" not in programs:
        pytest.skip("no GPU compiler: the jax-cuda12-pjrt wheel is not installed")
    codes, floats = programs[f"{chip} int8"], programs[f"{chip} bfloat16"]
    assert codes["temporary"] < 0.1 * ROWS * COLUMNS * D * 2 and codes["copies"] == 0
    assert codes["aliased"] >= codes["cache"]
    assert codes["cache"] <= 0.55 * floats["cache"]
    saved = floats["arguments"] - codes["arguments"]
    assert saved == pytest.approx(floats["cache"] - codes["cache"], rel=0.01)


def test_a_gpus_kernel_reads_the_cache_as_it_lies(programs):
    """Also in the loop of `generate`; what it leaves to be put together is small."""
    if "h100 step" not in programs:
        pytest.skip("no GPU compiler: the jax-cuda12-pjrt wheel is not installed")
    for name in ("h100 step", "h100 int8 step", "h100 loop"):
        made = programs[name]
        assert made["kernels"] == LAYERS, name
        assert made["copies"] == 0, name
    assert programs["h100 step"]["temporary"] < 0.1 * programs["h100 bfloat16"]["temporary"]


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_gpu_decodes_no_matrix_of_4_bits_into_memory(programs, kind):
    """The smallest of them would be 8 MB in bfloat16."""
    if "h100 step" not in programs:
        pytest.skip("no GPU compiler: the jax-cuda12-pjrt wheel is not installed")
    assert programs[f"h100 {kind} weights"]["temporary"] < 4e6


def test_an_old_gpu_gets_no_kernel(programs):
    """Its compiler refuses them. A prompt, steps, and weights of 4 bits do without."""
    if "t4 loop" not in programs:
        pytest.skip("no GPU compiler: the jax-cuda12-pjrt wheel is not installed")
    assert programs["t4 loop"]["kernels"] == programs["t4 int4 weights"]["kernels"] == 0


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_one_row_on_a_gpu_copies_no_weight(programs, weights):
    """With or without XLA's Triton products. cuBLAS alone would have the table in float32, and all codes."""
    if "h100 one row plain" not in programs:
        pytest.skip("no GPU compiler: the jax-cuda12-pjrt wheel is not installed")
    assert programs[f"h100 one row {weights}"]["temporary"] < 10e6
    assert programs[f"h100 one row {weights}, cuBLAS"]["temporary"] < 10e6


def test_a_prompt_holds_the_keys_of_a_layer_at_a_time(programs):
    """They are written to the cache at once: two layers more take no more memory, where theirs would be 134 MB."""
    assert programs["prompt, 4 layers"]["temporary"] < programs["prompt, 2 layers"]["temporary"] + 20e6


def test_an_int8_cache_takes_less_time(programs):
    """By the compiler's own estimate of a step that reads weights, too."""
    assert programs["v5e int8"]["cycles"] < 0.8 * programs["v5e bfloat16"]["cycles"]


def test_the_flat_layout_is_why_it_is_there(programs):
    """By the compiler's own estimate a step over heads takes longer by half at least."""
    assert programs["heads"]["cycles"] > 1.5 * programs["flat"]["cycles"]


def test_one_row_goes_to_the_matrix_unit(programs):
    """By the compiler's own estimate a step of one row takes less time than one of eight, whose cache is larger."""
    assert programs["one row"]["cycles"] < programs["flat"]["cycles"]


def test_the_best_score_stays_float32(programs):
    """An argmax whose maximum nobody reads is declared bfloat16 by the compiler: see generation/draw.py."""
    assert programs["loop auto"]["bfloat16 maxima"] == 0


def report(compiled, body_of_loop: bool = False) -> dict:
    """What the tests ask of a program. Cycles are those of its straight part: loops would count once."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    computations = re.split(r"\n(?=\S[^\n]*\{\n)", text)
    entry = next(part for part in computations if part.startswith("ENTRY"))
    part = entry
    if body_of_loop:
        loops = [line for line in entry.splitlines() if " while(" in line]
        [loop] = [line for line in loops if BUFFER in line or IN_HEADS in line]
        name = re.search(r"body=(%[\w.]+)", loop)
        assert name is not None
        part = next(part for part in computations if part.startswith(name[1] + " "))
    made = (f"bf16[{BUFFER}]", f"s8[{BUFFER}]", f"s8[{IN_HEADS}]", f"bf16[{IN_HEADS}]")
    lines = [line for line in part.splitlines() if any(shape in line.split("(")[0] for shape in made)]
    return {
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "copies": sum(re.search(r"\b(copy|transpose)\(", line) is not None for line in lines),
        "kernels": sum(" custom-call(" in line and "decode_attention" in line for line in part.splitlines()),
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        "bfloat16 maxima": len(re.findall(rf"= \(bf16\[{ROWS}\]\S* s32\[{ROWS}\]\S*\) (?:reduce|fusion)\(", text)),
    }


def prompts_on_many(described) -> dict:
    """Prompts into an empty cache, over chips that share the heads: while they talk, the compiler moves what it can."""
    import jax
    import jax.numpy as jnp

    import optjax
    from optjax.generation.decode import _prefill
    from optjax.sharding import make_mesh

    mesh, found = make_mesh("tensor=4", described), {}
    for layers in (2, 4):
        config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=layers)
        params = optjax.abstract_params(config, jnp.bfloat16, mesh=mesh)

        def place(x, placement=params.placement):
            axes = {0: (), 1: ("batch",), 2: ("batch", None), 3: ("batch", None, "heads")}[x.ndim]
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.fitting(x.shape, axes))

        empty = jax.eval_shape(lambda: optjax.init_cache(config, 32, 1024, jnp.bfloat16, layout="flat"))  # noqa: B023
        ids = place(jax.ShapeDtypeStruct((32, 512), jnp.int32))
        program = _prefill.lower(params, ids, None, jax.tree.map(place, empty), None, "auto", no_past=True)
        found[f"prompt, {layers} layers"] = report(program.compile())
    return found


def on_gpus(config) -> dict:
    """Programs of GPUs with kernels and without: of an H100, and of a T4, which is described by what sets it apart."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import optjax
    from optjax.generation.decode import _decode_step
    from optjax.generation.loop import run_generate
    from optjax.generation.settings import as_settings
    from optjax.sharding import make_mesh
    from optjax.sharding.plan import devices

    h100 = (Path(devices.__file__).with_name("gpus") / "h100.txtpb").read_text()
    t4 = h100.replace("{ major: 9 feature_extension: ACCELERATED_FEATURES }", "{ major: 7 minor: 5 }")
    assert t4 != h100
    found = {}
    for name, described, dtype in (("h100", h100, jnp.bfloat16), ("t4", t4, jnp.float16)):
        there = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=described)
        mesh = make_mesh("", list(there.devices))
        params = optjax.abstract_params(config, dtype, mesh=mesh)

        def place(tree, mesh=mesh):
            whole = jax.NamedSharding(mesh, jax.P())
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

        def step(params, cache_dtype=dtype, place=place):
            empty = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, COLUMNS, cache_dtype, layout="heads"))
            ids = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
            return report(_decode_step.lower(params, place(ids), place(empty)).compile())

        prompt = [place(jax.ShapeDtypeStruct((ROWS, 512), of)) for of in (jnp.int32, jnp.bool_)]
        number = place(jax.ShapeDtypeStruct((), jnp.int32))
        settings = place(as_settings(config, {}))
        loop = run_generate.lower(params, *prompt, settings, None, number, room=COLUMNS - 512).compile()
        found[f"{name} loop"] = report(loop, body_of_loop=True)
        found[f"{name} int4 weights"] = step(optjax.quantize(params, "int4"))
        if name == "h100":
            found[f"{name} nf4 weights"] = step(optjax.quantize(params, "nf4"))
            found |= {f"{name} step": step(params), f"{name} int8 step": step(params, "int8")}
    return found


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import optjax
    from optjax.cache import default_layout
    from optjax.generation.beam import run_beams
    from optjax.generation.decode import _decode_step
    from optjax.generation.loop import run_generate
    from optjax.generation.settings import as_settings
    from optjax.sharding import make_mesh
    from optjax.sharding.plan.devices import devices
    from optjax.sharding.plan.hardware import parse_topology

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    # A mesh of one chip tells the model what it is compiled for.
    mesh = make_mesh("", chips[:1])
    there = jax.NamedSharding(mesh, jax.P())

    def place(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

    config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=LAYERS)
    params = optjax.abstract_params(config, jnp.bfloat16, mesh=mesh)
    found = prompts_on_many(chips)
    for layout in ("heads", "flat"):
        empty = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, COLUMNS, jnp.bfloat16, layout=layout))  # noqa: B023
        ids = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=there)
        found[layout] = report(_decode_step.lower(params, ids, place(empty), "eager").compile())
    found["flat by a kernel"] = report(_decode_step.lower(params, ids, place(empty)).compile())
    one = jax.eval_shape(lambda: optjax.init_cache(config, 1, COLUMNS, jnp.bfloat16, layout="flat"))
    ids = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=there)
    found["one row"] = report(_decode_step.lower(params, ids, place(one), "eager").compile())
    prompt = [jax.ShapeDtypeStruct((ROWS, 64), dtype, sharding=there) for dtype in (jnp.int32, jnp.bool_)]
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=there)
    for (name, options), kind in itertools.product(({"loop": {}} | SEARCHES).items(), ("eager", "auto")):
        settings = as_settings(config, options | {"attn_implementation": kind})
        run = run_generate if settings.beams is None else run_beams
        columns = (COLUMNS - 64) // 4 if settings.beams else COLUMNS - 64 - (4 if settings.contrastive else 0)
        loop = run.lower(params, *prompt, place(settings), None, number, room=columns).compile()
        found[f"{name} {kind}"] = report(loop, body_of_loop=True)
    for name, dtype in itertools.product(("v5e:1x1", "h100:1"), ("bfloat16", "int8")):
        if name == "h100:1" and importlib.util.find_spec("jax_cuda12_plugin") is None:
            continue
        mesh = make_mesh("", devices(parse_topology(name))[:1])
        there = jax.NamedSharding(mesh, jax.P())
        layout = default_layout("tpu" if name == "v5e:1x1" else "gpu")
        empty = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, COLUMNS, dtype, layout=layout))  # noqa: B023
        ids = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=there)
        params = optjax.abstract_params(config, jnp.bfloat16, mesh=mesh)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((empty.keys, empty.values)))
        compiled = _decode_step.lower(params, ids, place(empty), "eager").compile()
        found[f"{name.split(':')[0]} {dtype}"] = report(compiled) | {"cache": size}
    if "h100 int8" in found:
        found |= on_gpus(config)
        one = jax.eval_shape(lambda: optjax.init_cache(config, 1, COLUMNS, jnp.bfloat16, layout="heads"))
        ids = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=there)
        for weights, some in (("plain", params), ("int8", optjax.quantize(params, "int8"))):
            step = _decode_step.lower(some, ids, place(one), "eager")
            found[f"h100 one row {weights}"] = report(step.compile())
            found[f"h100 one row {weights}, cuBLAS"] = report(step.compile({"xla_gpu_enable_triton_gemm": False}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
