"""The decode steps that the compilers compare: the page's figures, and one small case by the TPU compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from bench import decode_compiled
from bench.compiled_report import markdown
from bench.compiled_worker import Case
from optjax.sharding.plan import CHIPS, ENVIRONMENT, estimated_cycles


def test_the_page_counts_all_layers():
    """125m has 12: four more pairs of layers than the larger program. The rates are the chip's."""
    ours = Case("optjax", "125m", "v5e", 8, 2048, 2)
    known = []
    for side, cycles in (("optjax", 1_500_000), ("flax", 3_000_000), ("products", 1_250_000)):
        for layers in (2, 4):
            found = dict(
                cycles=cycles * layers, weights=10**8 * layers, cache=10**8, peak=1, temporaries=layers * 10**6
            )
            known.append({"case": asdict(ours) | {"side": side, "layers": layers}, "found": found})
    known.append({"case": asdict(ours) | {"layers": 12}, "found": known[0]["found"] | {"cycles": 18_300_000}})
    page = markdown(known)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "125m" in line]
    least = 1.3e9 / CHIPS["v5e"].hbm_bandwidth
    figures = ["1.30", f"{1e3 * least:.2f}", "12.00", f"{0.012 / least:.2f}", "1.20", "", "4.0"]
    assert rows[0] == ["125m, batch 8, optjax", *figures]
    assert rows[1][3] == "24.00" and rows[1][5:7] == ["2.40", "2.00"]
    assert rows[2] == ["125m, batch 8, optjax, v5e", "12.20", "12.00"]
    assert "estimated at 2.00 to 2.00 times optjax's" in page
    assert "## v5e, 2048 columns" in page
    assert "With 8 rows or more 1 of 1 are within 1.25" in page


def test_contexts_have_tables_of_their_own():
    figures = dict(weights=10**8, cache=10**8, peak=1, temporaries=10**6)
    cases = [Case("optjax", "125m", "h100", 8, context, layers) for context in (512, 2048) for layers in (2, 4)]
    page = markdown([{"case": asdict(case), "found": {**figures, "weights": case.context * 10**6}} for case in cases])
    first, second = page.split("## h100, 512 columns")[1].split("## h100, 2048 columns")
    assert "| 125m, batch 8, optjax | 0.61 |" in first and "| 125m, batch 8, optjax | 2.15 |" in second


def test_a_run_that_is_stopped_leaves_its_page(tmp_path, monkeypatch):
    """And one that has nothing to compile writes none."""
    figures = dict(weights=10**8, cache=10**8, peak=1, temporaries=10**6)

    def compile_all(cases):
        yield from ((case, figures) for case in cases[:2])
        raise KeyboardInterrupt

    options = "--sizes 125m --chips h100 --batches 8 --sides optjax --contexts 512 --results".split()
    monkeypatch.setattr(decode_compiled, "_has", lambda chip: True)
    monkeypatch.setattr(decode_compiled, "compile_all", compile_all)
    monkeypatch.setattr(sys, "argv", ["bench.decode_compiled", *options, str(tmp_path / "new")])
    with pytest.raises(KeyboardInterrupt):
        decode_compiled.main()
    assert "| 125m, batch 8, optjax | 0.20 |" in (tmp_path / "new" / "decode_compiled.md").read_text()
    monkeypatch.setattr(decode_compiled, "groups", lambda args, done: [])
    monkeypatch.setattr(sys, "argv", ["bench.decode_compiled", *options, str(tmp_path / "other")])
    decode_compiled.main()
    assert not (tmp_path / "other").exists()


def test_what_was_refused_is_said():
    case = Case("optjax", "13b", "v5e", 32, 2048, 2)
    cases = [asdict(case), asdict(case) | {"layers": 4}]
    page = markdown([{"case": each, "found": {"error": "JaxRuntimeError: RESOURCE_EXHAUSTED"}} for each in cases])
    assert "| 13b, batch 32, optjax | JaxRuntimeError |" in page


def test_a_step_is_a_share_of_the_plain_one():
    from bench import train_compiled

    options = {"batch": 64, "micro_batches": 2}
    one = {"mesh": "fsdp=64", "options": options, "capacity": 80 << 30, "state": 2 << 30, "fits": True}
    known = {"13b h100:64 all": one | {"peak": 7 << 30}, "13b h100:64 plain": one | {"peak": 102 << 30, "fits": False}}
    rows = [line for line in train_compiled.markdown(known).splitlines() if line.startswith("| ")][1:]
    assert rows[0].endswith("| 102.00 (does not fit) | 100.0% | 100.00 | 100.0% |")
    assert rows[1].endswith("| 7.00 | 6.9% | 5.00 | 5.0% |")


def test_cycles_of_a_loop_count_for_each_turn():
    text = """HloModule m
%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  ROOT %t = (s32[]) fusion(%p), calls=%f, metadata={op_name="jit(f)/mlp/dot"}, backend_config={"estimated_cycles":"7"}
}
%condition (p: (s32[])) -> pred[] {
  ROOT %p = (s32[]) parameter(0)
}
ENTRY %main (a: s32[]) -> (s32[]) {
  %a = s32[] parameter(0)
  %s = (s32[]) tuple(%a), backend_config={"estimated_cycles":"5"}
  ROOT %w = (s32[]) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""
    found = estimated_cycles(text)
    assert [(each.name, each.cycles, each.runs) for each in found] == [("t", 21, 3), ("s", 5, 1)]
    assert found[0].source == "jit(f)/mlp/dot"


@pytest.mark.tpu_compiler
def test_both_sides_are_compiled(repository):
    cases = [Case(side, "125m", "v5e", 8, 256, 1) for side in ("optjax", "flax", "products")]
    run = subprocess.run(
        [sys.executable, "-m", "bench.compiled_worker"],
        input=json.dumps([asdict(case) for case in cases]),
        env=os.environ | ENVIRONMENT,
        cwd=repository,
        capture_output=True,
        text=True,
    )
    ours, theirs, products = map(json.loads, run.stdout.splitlines())
    assert not any("error" in each for each in (ours, theirs, products)), run.stderr[-3000:]
    assert ours["weights"] == theirs["weights"] and 0 < ours["cycles"] < theirs["cycles"]
    assert 0 < products["cycles"] < theirs["cycles"]
