"""Decoding as XLA's compiler for GPUs sees it: two layers of OPT-1.3b's width, for an H100 and a T4 that are not there.

Needs the jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 wheels, and no GPU: nothing is run.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from decode_programs import COLUMNS, LAYERS, ROWS, check_codes, launches, report
from tpu_compiler import ask

pytestmark = pytest.mark.tpu_compiler


@pytest.fixture(scope="module")
def programs() -> dict:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("no GPU compiler: the jax-cuda12-plugin wheel is not installed")
    return ask(__file__)


def test_an_int8_cache_is_read_as_it_is(programs):
    check_codes(programs["int8, eager"], programs["bfloat16, eager"])


@pytest.mark.parametrize("program", ["bfloat16", "int8", "loop"])
def test_the_kernel_reads_the_cache_as_it_lies(programs, program):
    """Also in the loop of `generate`."""
    assert programs[program]["kernels"] == LAYERS
    assert programs[program]["copies"] == 0


def test_what_the_kernel_leaves_to_be_put_together_is_small(programs):
    assert programs["bfloat16"]["temporary"] < 0.1 * programs["bfloat16, eager"]["temporary"]


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_no_matrix_of_4_bits_is_decoded_into_memory(programs, kind):
    """The smallest of them would be 8 MB in bfloat16."""
    assert programs[f"{kind} weights"]["temporary"] < 4e6


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_one_row_copies_no_weight(programs, weights):
    """With or without XLA's Triton products. cuBLAS alone would have the table in float32, and all codes."""
    assert programs[f"one row, {weights}"]["temporary"] < 10e6
    assert programs[f"one row, {weights}, cuBLAS"]["temporary"] < 10e6


def test_an_old_gpu_gets_no_kernel(programs):
    """Its compiler refuses them. A prompt, steps, and weights of 4 bits do without."""
    assert programs["T4, loop"]["kernels"] == programs["T4, int4 weights"]["kernels"] == 0


@pytest.mark.parametrize("program", ["step", "int8 cache"])
def test_an_old_gpu_copies_no_weight(programs, program):
    """The matrices of queries, keys and values, put together for cuBLAS, would take 25 MB a layer."""
    assert programs[f"T4, {program}"]["temporary"] < 10e6


def test_an_old_gpu_copies_no_cache(programs):
    """In columns that tensor cores take, a layer's keys would be 67 MB more; the scores of 6 tokens are 17 MB."""
    assert programs["T4, guesses"]["temporary"] < 40e6


@pytest.mark.parametrize("card", ["H100", "T4"])
def test_a_threshold_starts_few_kernels(programs, card):
    """Of top_k and top_p together; found bit by bit they were 265."""
    assert programs[f"{card}, thresholds"] < 130


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import optjax
    from optjax.generation.decode import _decode_step
    from optjax.generation.loop import run_generate
    from optjax.generation.settings import as_settings
    from optjax.generation.thresholds import kth_largest, mass_threshold
    from optjax.kernels.choice import good_columns
    from optjax.model import Inputs, decoder
    from optjax.sharding import make_mesh
    from optjax.sharding.plan import devices

    config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=LAYERS)

    class Card:
        """A GPU by XLA's description of it, and programs for it."""

        def __init__(self, described: str, dtype):
            topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=described)
            self.mesh = make_mesh("", list(topology.devices))
            self.params = optjax.abstract_params(config, dtype, mesh=self.mesh)

        def place(self, tree):
            there = jax.NamedSharding(self.mesh, jax.P())
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

        def step(self, params, rows=ROWS, cache_dtype=None, kind="auto"):
            dtype = params.dtype if cache_dtype is None else cache_dtype
            empty = jax.eval_shape(lambda: optjax.init_cache(config, rows, COLUMNS, dtype, layout="heads"))
            self.cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((empty.keys, empty.values)))
            ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
            return _decode_step.lower(params, self.place(ids), self.place(empty), kind)

        def loop(self):
            prompt = [jax.ShapeDtypeStruct((ROWS, 512), dtype) for dtype in (jnp.int32, jnp.bool_)]
            number, settings = jax.ShapeDtypeStruct((), jnp.int32), as_settings(config, {})
            ids, mask, settings, number = self.place((*prompt, settings, number))
            return run_generate.lower(self.params, ids, mask, settings, None, number, room=COLUMNS - 512)

        def guesses(self):
            """A pass over 6 tokens of a row, as of speculative decoding."""
            columns = good_columns(self.params.placement, COLUMNS - 6, "auto")
            cache = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, columns, self.params.dtype, layout="heads"))
            ids, cache = self.place((jax.ShapeDtypeStruct((ROWS, 6), jnp.int32), cache))

            def read(params, ids, cache):
                return decoder(params, Inputs(ids=ids, cache=cache, attn_implementation="auto"))

            return jax.jit(read, donate_argnums=2).lower(self.params, ids, cache)

        def thresholds(self):
            scores, k, mass = (
                jax.ShapeDtypeStruct((ROWS, config.vocab_size), jnp.float32),
                jnp.int32(50),
                jnp.float32(0.9),
            )
            find = jax.jit(lambda x, k, mass: (kth_largest(x, k), mass_threshold(x, jax.nn.softmax(x), mass)))
            return find.lower(*self.place((scores, k, mass)))

    h100 = (Path(devices.__file__).with_name("gpus") / "h100.txtpb").read_text()
    t4 = h100.replace("{ major: 9 feature_extension: ACCELERATED_FEATURES }", "{ major: 7 minor: 5 }")
    assert t4 != h100  # what sets a T4 apart for XLA
    new, old, found = Card(h100, jnp.bfloat16), Card(t4, jnp.float16), {}
    for dtype in ("bfloat16", "int8"):
        found[dtype] = report(new.step(new.params, cache_dtype=dtype).compile())
        found[f"{dtype}, eager"] = report(new.step(new.params, cache_dtype=dtype, kind="eager").compile())
        found[f"{dtype}, eager"]["cache"] = new.cache_bytes
    for kind in ("int4", "nf4"):
        found[f"{kind} weights"] = report(new.step(optjax.quantize(new.params, kind)).compile())
    for weights, params in (("plain", new.params), ("int8", optjax.quantize(new.params, "int8"))):
        step = new.step(params, rows=1, kind="eager")
        found[f"one row, {weights}"] = report(step.compile())
        found[f"one row, {weights}, cuBLAS"] = report(step.compile({"xla_gpu_enable_triton_gemm": False}))
    found["loop"] = report(new.loop().compile(), body_of_loop=True)
    found["T4, loop"] = report(old.loop().compile(), body_of_loop=True)
    found["T4, int4 weights"] = report(old.step(optjax.quantize(old.params, "int4")).compile())
    found["T4, step"] = report(old.step(old.params).compile())
    found["T4, int8 cache"] = report(old.step(old.params, cache_dtype="int8").compile())
    found["T4, guesses"] = report(old.guesses().compile())
    for name, card in (("H100", new), ("T4", old)):
        found[f"{name}, thresholds"] = launches(card.thresholds().compile())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
