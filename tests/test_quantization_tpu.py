"""Decoding with quantized weights as the TPU compiler sees it: two layers of OPT-1.3b's width, for a v5e.

Needs the libtpu wheel (``pip install 'jax[tpu]'``), and no TPU: nothing is run.
"""

from __future__ import annotations

import json
import re

import pytest
from tpu_compiler import ask

ROWS, COLUMNS, LAYERS = 8, 128, 2
KINDS = ("int8", "int4", "nf4")

pytestmark = pytest.mark.tpu_compiler


@pytest.fixture(scope="module")
def programs() -> dict:
    return ask(__file__)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.55), ("int4", 0.42), ("nf4", 0.42)])
def test_bytes_of_a_step(programs, kind, most):
    """What a step reads of weights, beside bfloat16's; half of these is the embedding, in 8 bits."""
    assert programs[kind]["weights"] <= most * programs["bfloat16"]["weights"]
    assert programs[kind]["arguments"] - programs[kind]["weights"] < 1.1 * programs["bfloat16"]["others"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_in_full_precision(programs, kind):
    """None is written to the device's memory; in bfloat16 each is there, as an argument."""
    assert programs["bfloat16"]["matrices"] > 0
    assert programs[kind]["matrices"] == 0
    assert programs[kind]["temporary"] < 0.5 * 2 * 2048 * 2048


def test_int8_takes_less_time(programs):
    """By the compiler's own estimate; the bfloat16 step is bound by memory."""
    assert programs["int8"]["cycles"] < 0.7 * programs["bfloat16"]["cycles"]


def report(compiled, weights: int) -> dict:
    memory = compiled.memory_analysis()
    # What is written: fusions show their results only, and S(1) is fast memory.
    kept = [part for part in re.split(r"\n(?=\S[^\n]*\{\n)", compiled.as_text()) if not part.startswith("%fused")]
    shape = r"= \(?(?:bf16|f32)\[(?:2048,2048|8192,2048|2048,8192|50272,2048)\]\{[^}]*\}"
    found = [match for part in kept for match in re.findall(shape, part)]
    entry = next(part for part in kept if part.startswith("ENTRY"))
    return {
        "weights": weights,
        "arguments": memory.argument_size_in_bytes,
        "others": memory.argument_size_in_bytes - weights,
        "temporary": memory.temp_size_in_bytes,
        "matrices": sum("S(1)" not in each for each in found),
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
    }


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import optjax
    from optjax.generation.decode import _decode_step
    from optjax.quantization.weight import nbytes
    from optjax.sharding import make_mesh

    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    mesh = make_mesh("", [chip])  # of one chip: tells the model what it is compiled for
    there = jax.NamedSharding(mesh, jax.P())
    config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=LAYERS)
    full = optjax.abstract_params(config, jnp.bfloat16, mesh=mesh)
    empty = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, COLUMNS, jnp.bfloat16, layout="flat"))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), empty)
    ids = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=there)
    found = {}
    for kind in ("bfloat16", *KINDS):
        params = full if kind == "bfloat16" else optjax.quantize(full, kind)
        compiled = _decode_step.lower(params, ids, cache, "eager").compile()
        found[kind] = report(compiled, sum(nbytes(leaf) for leaf in jax.tree.leaves(params)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
