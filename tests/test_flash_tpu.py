"""Kernels of attention as the TPU compiler sees them: OPT-1.3b's width in bfloat16, for a v5e that is not there.

Needs the libtpu wheel (``pip install 'jax[tpu]'``), and no TPU: nothing is run.
"""

from __future__ import annotations

import json

import pytest
from tpu_compiler import ask

ROWS, LENGTH, HEADS = 2, 2048, 32

pytestmark = pytest.mark.tpu_compiler


@pytest.fixture(scope="module")
def programs() -> dict:
    return ask(__file__)


@pytest.mark.parametrize("name", ["prefill", "train step"])
def test_scores_never_exist_in_full(programs, name):
    flash, eager = programs[f"{name} flash"], programs[f"{name} eager"]
    assert flash["kernels"] > 0 and eager["kernels"] == 0
    assert flash["scores"] == 0
    assert flash["temporary"] < eager["temporary"]


def report(compiled) -> dict:
    """Kernels called, arrays of the size of all scores of a row, and bytes of temporaries."""
    text = compiled.as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "scores": text.count(f"{HEADS},{LENGTH},{LENGTH}]"),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    import optjax
    from optjax.sharding import make_mesh
    from optjax.sharding.plan.devices import devices
    from optjax.sharding.plan.generation import generation_programs
    from optjax.sharding.plan.hardware import parse_topology
    from optjax.train.ahead import train_programs

    mesh = make_mesh("", devices(parse_topology("v5e:1x1"))[:1])
    config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=1, vocab_size=1024)
    placement = optjax.abstract_params(config, mesh=mesh).placement
    assert placement is not None
    found = {}
    for kind in ("eager", "flash"):
        options = {"batch": ROWS, "length": LENGTH, "dtype": "bfloat16", "remat": "full", "attn_implementation": kind}
        [step] = train_programs(config, placement, **options)
        found[f"train step {kind}"] = report(step.function.lower(*step.arguments).compile())
        prefill = generation_programs(config, placement, batch=ROWS, prompt=LENGTH, cache_length=LENGTH)[0]
        arguments = *prefill.arguments[:4], None, kind, True
        found[f"prefill {kind}"] = report(prefill.function.lower(*arguments).compile())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
