"""The benchmarks run, and their sides make the same tokens. Nothing here asserts on a time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import optjax
from bench import attention_gpu, attention_sides, decode_gpu, gpu, prepare, report, sides
from bench.decode_cpu import Cell, Result
from optjax.kernels.choice import interpreted


def _run(repository, *arguments, **environment):
    program, variables = [sys.executable, "-m", *map(str, arguments)], os.environ | environment
    done = subprocess.run(program, cwd=repository, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("strategy", "batch", "who"),
    [
        ("--guess lookup --new 12", 1, ["optjax", "torch"]),
        ("--batches 2 --beams 3 --int8 --in-turn", 2, ["optjax", "optjax-int8", "torch"]),
    ],
)
def test_decode_cpu_compares_the_same_tokens(repository, tmp_path, strategy, batch, who):
    """Guessed, and by beams in one process after the other; int8 may choose another token of a random model."""
    file = tmp_path / "figures.json"
    options = "--sizes tiny --prompt 8 --new 4 --rounds 1 --threads 1".split() + strategy.split()
    printed = _run(repository, "bench.decode_cpu", *options, "--sides", *who, "--json", file)
    assert f"OPT-tiny, batch {batch}" in printed
    results = json.loads(file.read_text())["results"]
    assert [r["side"] for r in results] == who
    assert all(r["same_tokens"] == 1 for r in results if "int8" not in r["side"])
    for result in results:
        assert len(result["one_token"]) == len(result["all_tokens"]) == 1
        assert result["peak"] > 20e6 and result["limit"] > 0


def test_the_limit_reads_a_prompt_once_and_the_tokens_of_each_beam():
    shape = prepare.SIZES["tiny"]
    token = 2 * 4 * shape["hidden_size"] * shape["num_hidden_layers"]
    for beams in (1, 4):
        cell = Cell("tiny", 8, argparse.Namespace(prompt=16, new=6, beams=beams))
        assert cell.kept_bytes == 8 * token * (16 + 3 * beams)


def test_every_guess_is_right(tmp_path):
    """So that guessing is shown at its best: of transformers, too, a pass of the model gives `GUESSES` and one more."""
    prepare.write(tmp_path / "hf", prepare.SIZES["tiny"], "float32", repeats=True)
    prepare.write(tmp_path / "assistant", prepare.ASSISTANT | {"vocab_size": 512}, "float32", repeats=True)
    ids = np.arange(5, 21)[None]
    ours, theirs = sides.Optjax(), sides.Torch()
    for side in (ours, theirs):
        side.load(tmp_path, {"threads": torch.get_num_threads()})
    passes = []
    theirs.model.register_forward_hook(lambda *_: passes.append(1))
    for guess in ("lookup", "assistant"):
        new = ours.generate(ids, 31, guess=guess)
        assert (new == 20).all() and (theirs.generate(ids, 31, guess=guess) == 20).all()
    told = {"assistant_model": ours.assistant, "num_assistant_tokens": sides.GUESSES}
    out = optjax.generate(ours.params, ids, max_new_tokens=31, return_dict_in_generate=True, **told)
    assert out.passes == 6 and 2 * 6 <= len(passes) <= 2 * 8


def test_train_cpu_compares_the_same_losses(repository, tmp_path):
    file = tmp_path / "figures.json"
    options = "--layers 1 --width 16 --heads 2 --vocab 64 --length 12 --batch 2 --rounds 1 --steps 2 --threads 1"
    printed = _run(repository, "bench.train_cpu", *options.split(), "--json", file)
    results = json.loads(file.read_text())
    assert [r["side"] for r in results] == ["optjax", "torch", "flax"] and printed.count("×") == 2
    for result in results:
        assert len(result["rounds"]) == 1 and result["rounds"][0] > 0 and result["peak"] > 20e6
        np.testing.assert_allclose(result["losses"], results[0]["losses"], rtol=1e-4)
    assert len(set(results[0]["losses"])) == 3


def test_decode_gpu_runs_dry(repository, tmp_path):
    """On a CPU all is run but the GPU, and float32 sides make the same tokens."""
    options = "--device cpu --dtype float32 --sizes tiny --lengths 8 16 --batches 2 --new 3 --rounds 1 --threads 1"
    who = "--sides torch-eager torch-flash optjax-gpu-eager optjax-gpu"
    out = ["--save", "--out", tmp_path, "--json", tmp_path / "figures.json"]
    _run(repository, "bench.decode_gpu", *options.split(), *who.split(), *out)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(r["side"], r["length"]) for r in figures] == [
        (side, length) for length in (8, 16) for side in ("torch-eager", "optjax-gpu-eager", "optjax-gpu")
    ]
    assert all(r["same_tokens"] == 1 and r["peak"] > 20e6 and len(r["all_tokens"]) == 1 for r in figures)
    page = (tmp_path / "decode_gpu.md").read_text()
    # Two ratios of a side in each cell, or what says that noise was larger.
    assert page.count("×") + page.count("| – | ") >= 4 and "dry run" in page and "optjax: prefill" in page
    assert (tmp_path / "decode_gpu_tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_attention_gpu_runs_dry(repository, tmp_path):
    options = "--device cpu --dtype float32 --shapes tiny --lengths 16 32 --tokens 64 --calls 1 --rounds 1 --threads 1"
    who = "--sides torch-sdpa jax-cudnn optjax-plain"
    out = ["--save", "--out", tmp_path, "--json", tmp_path / "figures.json"]
    _run(repository, "bench.attention_gpu", *options.split(), *who.split(), *out)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 2 * 2 * 2 and {r["batch"] for r in figures} == {2, 4}
    assert all(r["difference"] < 1e-5 and r["seconds"][0] > 0 for r in figures)
    assert (tmp_path / "attention_gpu.md").is_file() and (tmp_path / "attention_gpu_tiny.png").is_file()


@pytest.mark.parametrize("backward", [False, True])
def test_attentions_are_the_same(backward):
    """Outputs or gradients of all sides that a CPU can run, to float32's rounding."""
    samples = {}
    for name in ("torch-eager", "torch-sdpa", "optjax-plain", "optjax-blocks", "optjax-flash"):
        side = attention_sides.side(name)
        side.load(Path(), {"device": "cpu", "threads": torch.get_num_threads(), "dtype": "float32"})
        with interpreted("gpu"):  # of the kernel; the others take no notice
            samples[name] = side.attend([2, 24, 4, 16], backward, 1, True)["sample"]
    differences = [attention_gpu.difference(each, samples["torch-eager"]) for each in samples.values()]
    assert differences[0] == 0 and all(0 < each < 1e-5 for each in differences[1:])


def test_gpu_programs_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    for program in (decode_gpu, attention_gpu):
        monkeypatch.setattr("sys.argv", ["program"])
        with pytest.raises(SystemExit) as exit:
            program.main()
        assert exit.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


def test_a_side_without_memory_is_a_result(tmp_path):
    """And what makes other tokens is an error, by all prompts together."""
    row = {side: decode_gpu.Result("tiny", 1, 8, side, 3) for side in ("torch-eager", "torch-sdpa", "optjax-gpu")}
    row["torch-eager"].failed = gpu.FULL
    for side, seconds in (("torch-sdpa", 4.0), ("optjax-gpu", 2.0)):
        row[side].one_token, row[side].all_tokens = [seconds], [2 * seconds]
    assert decode_gpu._cells(row["torch-eager"], list(row.values()))[2] == "out of memory"
    assert decode_gpu._cells(row["torch-sdpa"], list(row.values()))[3:6:2] == ["2.00×", "2.00×"]
    decode_gpu.draw(tmp_path / "p.png", list(row.values()), "a device")
    decode_gpu.compare(row, {"torch-sdpa": [[1, 2, 3]], "optjax-gpu": [[1, 2, 4]]})
    assert row["optjax-gpu"].same_tokens == pytest.approx(2 / 3)
    decode_gpu.compare(row, {"torch-sdpa": [[1, 2, 3]], "optjax-gpu": [[2, 2, 3]]})
    with pytest.raises(RuntimeError, match="0% of the first side's first tokens"):
        decode_gpu.check_first_tokens(list(row.values()))
    # Near ties in half precision: one first token of some may differ.
    decode_gpu.check_first_tokens([*row.values(), decode_gpu.Result("tiny", 8, 8, "optjax-gpu", 3)])


def test_what_lacks_memory(capsys):
    """Not a kernel that wants more of a core's own memory than there is: that is told."""
    assert gpu.failure(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")) == gpu.FULL
    assert gpu.failure(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")) == gpu.FULL
    assert gpu.failure(RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit")).startswith("failed: ")
    assert "Shared memory" in capsys.readouterr().err


class FakeWorker:
    """Makes the tokens that it is asked for, but for one side, which breaks at what ``breaks`` says."""

    alive: ClassVar[list[str]] = []
    most = 0
    breaks = "load"

    def __init__(self, side, options, log):
        self.side = side
        self.alive.append(side)
        FakeWorker.most = max(self.most, len(self.alive))

    def ask(self, **request):
        if self.side.endswith("torch-flash") and self.breaks in request:
            raise RuntimeError("torch-flash: ImportError: undefined symbol")
        size = {"sample": [1.0, 2.0], "version": "1", "seconds": 1.0 + request.get("new", 0), "peak": 1}
        return size | {"ids": [[7] * request.get("new", 0)]}

    def close(self):
        self.alive.remove(self.side)


@pytest.mark.parametrize("breaks", ["loading", "measuring"])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("program", [decode_gpu, attention_gpu])
def test_a_side_that_breaks_leaves_the_others(monkeypatch, tmp_path, capsys, program, in_turn, breaks):
    """Whoever has a GPU for some minutes gets what could be measured, and status 1."""
    decodes = program is decode_gpu
    monkeypatch.setattr(FakeWorker, "breaks", "load" if breaks == "loading" else "ids" if decodes else "shape")
    monkeypatch.setattr(FakeWorker, "most", 0)
    monkeypatch.setattr(program, "Worker", FakeWorker)
    monkeypatch.setattr(gpu, "name_of_device", lambda parser, device: "a device")
    monkeypatch.setattr(gpu, "present", lambda names, sides, device: list(sides))
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(decode_gpu.subprocess, "run", lambda *words, **how: done)
    sides = ["torch-eager", "torch-flash", "optjax-gpu" if decodes else "optjax-flash"]
    words = ["--sizes" if decodes else "--shapes", "tiny", "--lengths", "16", "--rounds", "1", "--sides", *sides]
    words += ["--batches", "1"] if decodes else ["--parts", "forward"]
    words += ["--save", "--out", str(tmp_path), "--json", str(tmp_path / "f.json"), *["--in-turn"] * in_turn]
    monkeypatch.setattr("sys.argv", ["program", *words])
    with pytest.raises(SystemExit) as exit:
        program.main()
    assert exit.value.code == 1 and FakeWorker.most == (1 if in_turn else 3)
    printed = capsys.readouterr()
    assert "undefined symbol" in printed.err
    assert "failed: torch-flash: ImportError" in printed.out and ("--in-turn" in printed.out) == in_turn
    figures = {r["side"]: r for r in json.loads((tmp_path / "f.json").read_text())}
    assert [bool(figures[side]["failed"]) for side in sides] == [False, True, False]


def test_float32_is_the_same_on_all_sides(monkeypatch):
    """torch multiplies all bits; jax on an A100 would round to TF32."""
    for dtype, wanted in (("float32", "highest"), ("bfloat16", None)):
        environment: dict[str, str] = {}
        monkeypatch.setattr(sides.os, "environ", environment)
        sides.limit({"device": "gpu", "dtype": dtype, "threads": 1})
        assert environment.get("JAX_DEFAULT_MATMUL_PRECISION") == wanted


def test_a_ratio_says_how_many_times_as_fast_optjax_is():
    quick = Result("125m", 8, "optjax", "1", 0, one_token=[1, 1, 1], all_tokens=[2, 3, 4], peak=10**9, limit=100)
    slow = Result("125m", 8, "torch", "2", 0, one_token=[2, 2, 2], all_tokens=[8, 6, 10], peak=2 * 10**9, limit=100)
    results = [vars(r) | {"decoding": r.decoding(new=11)} for r in (quick, slow)]
    # 80 tokens after the first ones, in 3 - 1 and in 8 - 2 seconds.
    assert [r["decoding"] for r in results] == pytest.approx([40, 80 / 6])
    given = {"sizes": ["125m"], "batches": [8], "rounds": 3, "prompt": 5, "new": 11, "threads": 2, "beams": 1}
    lines = report.markdown(report.Outcome(results, given)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert table[0]["of the limit"] == "40%" and table[0]["optjax: all"] == ""
    # By round: 8 / 2, 6 / 3, 10 / 4.
    assert table[1]["optjax: all"] == "2.50×" and table[1]["optjax: decoding"] == "3.00×"
    assert table[1]["peak, MB"] == "2000"


def test_small_products(repository):
    printed = _run(repository, "bench.small_products", "--rows", "2", "--rounds", "1", "--megabytes", "1")
    header, *rows = printed.splitlines()
    assert "ratio" in header and len(rows) == 6
    assert all(float(row.split()[-1]) > 0 for row in rows)


def test_the_loop_beside_its_step(repository):
    """As many rounds as are asked for; the one that compiles is none of them."""
    small = "--layers 1 --hidden 16 --length 8 --batch 2 --vocabulary 64 --steps 2 --rounds 1"
    printed = _run(repository, "bench.train_loop", *small.split())
    assert "medians of 1 rounds of 2" in printed


def test_quantization_of_opt_mini(repository, shared_data, tmp_path):
    """int8 is as good as float32, of weights and of the cache, int4 nearly, and more so by GPTQ: on WikiText-2 and
    on a novel that opt-mini has not read."""
    file = tmp_path / "figures.json"
    options = "--windows 8 --kinds float32+cache int8+cache int8 int4 nf4 int4+gptq".split()
    # It computes for longer than it compiles: XLA is to optimize.
    printed = _run(repository, "bench.quantization", *options, "--json", file, XLA_FLAGS="")
    results = json.loads(file.read_text())
    assert len({r["text"] for r in results}) == 2 and printed.count("| nf4 |") == 2
    for r in results:
        if r["kind"].endswith("+cache"):
            assert 0 < r["largest_error"] <= (0.02 if r["kind"] == "float32+cache" else 0.03)
            assert abs(r["change"]) <= 0.005
        elif r["kind"] == "int8":
            assert r["largest_error"] <= 0.02 and abs(r["change"]) <= 0.005
            assert r["megabytes"] < 0.28 * next(o["megabytes"] for o in results if o["kind"] == "float32")
        elif r["kind"].endswith("+gptq"):
            # The largest of so many logits is from 3.5% to 5.6%, as it happens; the mean one is half that of int4.
            assert r["mean_error"] <= 0.035 and r["largest_error"] <= 0.08 and abs(r["change"]) <= 0.02
        elif r["kind"] != "float32":
            assert r["largest_error"] <= 0.1 and abs(r["change"]) <= 0.05


def test_quantization_of_a_short_text_is_refused(repository, tmp_path):
    (tmp_path / "short.txt").write_text("The old house stood at the end of the road.")
    program = [sys.executable, "-m", "bench.quantization", "--kinds", "int8", "--text", str(tmp_path / "short.txt")]
    done = subprocess.run(program, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1 and "short.txt has 12 tokens, and a window 512" in done.stderr
    assert "Traceback" not in done.stderr


def test_import_time(repository):
    printed = _run(repository, "bench.import_time", "--rounds", "1")
    assert [line.split("  ")[0] for line in printed.splitlines()] == [
        "import jax",
        "import optjax",
        "import optjax; optjax.generate",
    ]
