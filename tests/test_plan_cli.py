"""`optjax plan`, and plans in Python. What compiles for TPU needs the libtpu wheel, and no TPU; all else neither."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from optjax import OPTConfig
from optjax.cli import main
from optjax.sharding.plan import asking, compiling, planning
from optjax.sharding.plan.compiling import Compiled, Traffic, memory_asked
from optjax.sharding.plan.estimate import estimate, memory
from optjax.sharding.plan.planning import plan
from optjax.sharding.plan.request import make_request

GiB = 2**30
TINY: dict[str, Any] = dict(
    vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, ffn_dim=512, dropout=0.0,
    max_position_embeddings=256, bos_token_id=2,
)  # fmt: skip
needs_libtpu = pytest.mark.tpu_compiler


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    OPTConfig(**TINY).to_json(path)
    return path


class Answer:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def optjax_plan(capsys):
    def run(words: str) -> Answer:
        status = main(["plan", *shlex.split(words)])
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture
def compiler(monkeypatch):
    """In place of a compiler: each program has its arguments, and half a GiB; it is kept what was asked."""

    class Compiler:
        asked: list[dict[str, Any]] = []
        peak: int | None = None
        refused: str | None = None

        def __call__(self, config, topology, *, job, mesh, rules, options, save=None):
            self.asked.append({"job": job, "mesh": mesh, "rules": rules, "options": options, "topology": topology.name})
            request = make_request(config, topology, job, mesh=mesh, rules=rules, **options)
            made = []
            for name, work in request.works().items():
                groups = {part: size for part, size in work.memory.items() if part not in ("gradients", "activations")}
                inside = {part: size for part, size in work.memory.items() if part == "gradients"}
                peak = self.peak or work.least_memory + GiB // 2
                lines = (Traffic("all-gather", ("fsdp",), 192, 10 * GiB, 0.25, 96, GiB // 4),)
                made.append(Compiled(name, groups, inside, sum(groups.values()), peak, self.refused, lines, 1.5))
            return made, 0

    stand_in = Compiler()
    stand_in.asked = []
    monkeypatch.setattr(planning, "ask", stand_in)
    return stand_in


def test_a_training_plan(optjax_plan, compiler):
    answer = optjax_plan("opt-175b --topology v5p:4x4x8 --job train --mesh fsdp=32,tensor=4 --batch 1024")
    assert answer.status == 0 and answer.err == ""
    assert "128 devices of TPU v5p" in answer.out and "mesh fsdp=32,tensor=4" in answer.out
    assert re.search(r"fits: [\d.]+ GiB of 95\.7 GiB", answer.out)
    for row in ("weights", "optimizer state", "gradients", "temporaries", "peak", "floor", "bound by", "tokens/s"):
        assert re.search(rf"^{row}\b", answer.out, re.MULTILINE), row
    assert re.search(r"^In use while it computes, .*two layers' weights 1\.7 GiB", answer.out, re.MULTILINE)
    assert re.search(r"all-gather +fsdp +192 +96 +0\.2 GiB +10\.0 GiB +250 ms", answer.out)
    [asked] = compiler.asked
    assert asked["mesh"] == {"data": 1, "fsdp": 32, "sequence": 1, "tensor": 4}
    assert asked["options"]["batch"] == 1024 and 1024 % asked["options"]["micro_batches"] == 0


def test_the_command_of_a_plan_makes_it_again(optjax_plan, compiler, tiny):
    """Of a config's file too, and with whatever `plan` takes."""
    for words in (
        f"{tiny} --topology v5e:2x2 --batch 8",
        f"{tiny} --topology h100:4 --job generate --dtype float32 --cache-dtype float16 --prompt 64",
        f"{tiny} --topology v5e:1x1 --job generate --offload disk --disk-bandwidth 3.5",
        "facebook/opt-125m --topology v5e:2x2 --rules fsdp --query-block 0 --dropout 0.1",
    ):
        first = json.loads(optjax_plan(f"{words} --json").out)
        again = json.loads(optjax_plan(f"{first['command'].removeprefix('optjax plan ')} --json").out)
        assert again == first
    found = optjax_plan(f"{tiny} --topology v5e:2x2 --batch 8 --search --limit 1")
    assert re.search(rf"the first again: optjax plan {re.escape(str(tiny))} --topology v5e:2x2 ", found.out)


def test_micro_batches_are_as_many_as_cost_no_time():
    """One row a device where the links are fast; where weights are gathered over a slower network, more rows, but no
    more than fit."""
    fast, slow = (make_request("opt-175b", s, mesh="fsdp=8,tensor=8", batch=1024) for s in ("v5p:4x4x4", "h100:64"))
    assert fast.options["micro_batches"] == 1024 // 8 > slow.options["micro_batches"]
    one_row = replace(slow, options={**slow.options, "micro_batches": 128})
    assert estimate(slow).floor < 0.5 * estimate(one_row).floor
    assert memory(slow) < slow.topology.chip.capacity
    full = make_request("opt-175b", "v5p:2x4x4", mesh="fsdp=8,tensor=4", batch=1024)
    assert full.options["micro_batches"] == 1024 // 8


def test_a_plan_for_generation_that_does_not_fit(optjax_plan, compiler):
    compiler.peak = 90 * GiB
    answer = optjax_plan("opt-175b --topology h100:8 --job generate --batch 16")
    assert answer.status == 3
    assert "does not fit by 12.9 GiB" in answer.out
    assert "prefill" in answer.out and "decode step" in answer.out


@pytest.mark.parametrize("words", ["--batch 8 --moments-memory host", "--job generate --offload host"])
def test_the_memory_of_a_gpus_host_is_not_planned(optjax_plan, tiny, words):
    """Its compiler would count what lies there as on the device."""
    answer = optjax_plan(f"{tiny} --topology h100:8 {words}")
    assert answer.status == 1 and "='host' cannot be planned for GPUs" in answer.err


def test_a_refusal_is_no_error(optjax_plan, compiler):
    words = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.01G of 15.75G hbm. Exceeded by 4.26G."
    compiler.refused, compiler.peak = words, memory_asked(words)
    answer = optjax_plan("opt-1.3b --topology v5e:2x2")
    assert answer.status == 3 and "does not fit by 4.3 GiB" in answer.out and "Traceback" not in answer.err


def test_memory_asked():
    assert memory_asked("RESOURCE_EXHAUSTED: … Used 20.5G of 15.75G hbm. Exceeded") == int(20.5 * GiB)
    assert memory_asked("RESOURCE_EXHAUSTED: … Used 512.5M of 15.75G hbm.") == int(512.5 * 2**20)
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (48.50G) exceeds"
    )
    assert memory_asked(f"{early} available HBM (15.75G).") == int(48.5 * GiB)
    assert memory_asked("INTERNAL: something else") is None


def test_json_comes_back(optjax_plan, compiler):
    answer = optjax_plan("opt-30b --topology v6e:8x8 --json --moments-dtype bfloat16")
    data = json.loads(answer.out)
    assert data["fits"] is True and data["options"]["moments_dtype"] == "bfloat16"
    step = data["steps"]["train step"]
    assert sum(step["memory"].values()) == step["compiled"]["peak"] and data["working_set"]["a layer's gradient"] > 0
    assert json.loads(planning.from_dict(data).to_json()) == data


def test_the_command_of_a_plan_asks_for_the_same(optjax_plan, compiler):
    first = json.loads(optjax_plan("opt-13b --topology 2xv5e:8x8 --length 1024 --remat dots --json").out)
    words = first["command"].removeprefix("optjax plan ")
    again = json.loads(optjax_plan(f"{words} --json").out)
    assert again == first
    assert compiler.asked[0] == compiler.asked[1]


def test_settings_of_a_run(optjax_plan, compiler, tmp_path):
    """Its size and levers are planned, flags beat them, and what does not change a plan is left aside."""
    settings = {"config": "opt-1.3b", "batch_size": 64, "length": 1024, "remat": "dots", "mesh": "fsdp=8,tensor=2"}
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"lr": 1e-3, "data": ["x"], "stacked": False}))
    found = json.loads(optjax_plan(f"--settings {tmp_path} --topology v5e:4x4 --remat full --json").out)
    same = "opt-1.3b --topology v5e:4x4 --batch 64 --length 1024 --mesh fsdp=8,tensor=2 --json"
    assert found == json.loads(optjax_plan(same).out)
    (tmp_path / "one.toml").write_text('preset = "opt-125m"\n')
    found = json.loads(optjax_plan(f"--settings {tmp_path}/one.toml --topology v5e:4x4 --json").out)
    assert found == json.loads(optjax_plan("opt-125m --topology v5e:4x4 --json").out)


def test_a_plot_is_drawn(optjax_plan, compiler, tmp_path):
    for job in ("train", "generate"):
        file = tmp_path / f"{job}.png"
        assert optjax_plan(f"opt-1.3b --topology v5e:4x4 --job {job} --batch 64 --plot {file}").status == 0
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_plan_shows_itself_in_a_notebook(compiler):
    made = plan("opt-1.3b", "v5e:4x4", batch=64)
    html = made._repr_html_()
    assert html.startswith("<pre") and "optimizer state" in html
    assert "optimizer state" in str(made) and max(map(len, str(made).splitlines())) <= 120


def test_search_ranks_what_fits(optjax_plan, compiler):
    answer = optjax_plan("opt-1.3b --topology v5e:4x4 --batch 512 --search --limit 5")
    assert answer.status == 0
    assert len(compiler.asked) == 5 and len({json.dumps(asked, sort_keys=True) for asked in compiler.asked}) == 5
    ranked = json.loads(optjax_plan("opt-1.3b --topology v5e:4x4 --batch 512 --search --limit 5 --json").out)
    floors = [each["steps"]["train step"]["seconds_at_least"]["floor"] for each in ranked]
    assert floors == sorted(floors)
    assert ranked[0]["command"] in answer.out


def test_search_keeps_what_is_given_and_leaves_out_what_cannot_fit(optjax_plan, compiler):
    optjax_plan("opt-13b --topology v5e:4x4 --batch 512 --remat full --rules fsdp+tensor --search --limit 3")
    assert {(asked["options"]["remat"], asked["rules"]) for asked in compiler.asked} == {("full", "fsdp+tensor")}
    compiler.asked.clear()
    answer = optjax_plan("opt-175b --topology v5e:4x4 --search")
    assert answer.status == 3 and compiler.asked == []
    assert "0 compiled" in answer.out


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        ("opt-175b --topology v5e:2x2x2", 1, ["v5e:2x2x2", "16x16"]),
        ("opt-17b --topology v5e:2x2", 1, ["opt-17b", "opt-175b"]),
        ("opt-1.3b --topology v9:2x2", 1, ["no chip named 'v9'", "v5p"]),
        ("opt-1.3b --topology v5e:4x4 --mesh fsdp=3", 1, ["fsdp=3", "16"]),
        ("opt-1.3b --topology v5e:4x4 --mesh model=16", 1, ["model", "tensor"]),
        ("opt-30b --topology v5e:4x4 --mesh tensor=16", 1, ["q_proj", "56", "fsdp="]),
        ("opt-1.3b --topology v5e:4x4 --rules nope", 1, ["nope", "fsdp+tensor"]),
        ("opt-1.3b --topology v5e:4x4 --batch 7", 1, ["7 rows", "multiple of 16"]),
        ("opt-1.3b --topology v5e:4x4 --batch 64 --micro-batches 3", 1, ["64", "3 micro-batches", "multiple of 48"]),
        ("opt-1.3b --topology v5e:4x4 --length 4096", 1, ["4096", "2048"]),
        ("opt-1.3b --topology v5e:4x4 --dropout 1.5", 1, ["dropout", "1.5"]),
        ("opt-1.3b --topology v5e:4x4 --job generate --remat full", 1, ["generate", "remat"]),
        ("opt-1.3b --topology v5e:2x2 --job generate --prompt 2000 --cache-length 1000", 1, ["2000", "1000"]),
        ("opt-1.3b --topology v5e:2x2 --plot /no/such/folder/x.png", 1, ["/no/such/folder"]),
        ("opt-1.3b --topology v5e:2x2 --plot plan.txt", 2, ["plan.txt", ".png"]),
        ("opt-1.3b", 2, ["--topology"]),
        ("--topology v5e:2x2", 2, ["which size"]),
        ("--topology v5e:2x2 --settings /no/such/file.toml", 1, ["no settings file /no/such/file.toml"]),
        ("--topology v5e:2x2 --settings x.toml --job generate", 2, ["training run"]),
        ("opt-1.3b --topology v5e:2x2 --job dream", 2, ["dream", "generate"]),
        ("opt-1.3b --topology v5e:2x2 --batch 0", 2, ["--batch", "at least 1"]),
        ("opt-1.3b --topology v5e:2x2 --mircobatches 2", 2, ["--mircobatches"]),
    ],
)
def test_errors_come_before_anything_is_compiled(optjax_plan, compiler, words: str, status: int, parts: list[str]):
    answer = optjax_plan(words)
    assert answer.status == status and answer.out == "" and compiler.asked == []
    lines = answer.err.strip().splitlines()
    assert lines[-1].startswith("optjax: error: ") and "Traceback" not in answer.err
    for part in parts:
        assert part in lines[-1]


@pytest.mark.parametrize(("topology", "module", "extra"), [("v5e:2x2", "libtpu", "plan-tpu"), ("h100:8", "jax_cuda12_plugin", "plan-gpu")])  # fmt: skip  # noqa: E501
def test_a_missing_compiler_is_named_with_what_brings_it(optjax_plan, monkeypatch, topology, module, extra):
    from optjax.sharding.plan import devices

    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    answer = optjax_plan(f"opt-125m --topology {topology}")
    assert answer.status == 1 and f"pip install 'optjax[{extra}]'" in answer.err


def test_what_the_worker_cannot_do_is_an_error_here(monkeypatch, tiny):
    """The process is real; there is no such job in it."""
    monkeypatch.setattr(asking, "check_compiler", lambda topology: None)
    request = make_request(OPTConfig(**TINY), "v5e:2x2", batch=8, length=128)
    with pytest.raises((ValueError, ImportError, RuntimeError)) as error:
        asking.ask(request.config, request.topology, job="nothing", mesh=request.mesh, rules=request.rules, options={})
    assert "nothing" in str(error.value) or "plan-tpu" in str(error.value)


def test_compiled_comes_back_from_json():
    lines = (Traffic("all-reduce", ("fsdp", "tensor"), 3, 4, 0.5, 1, 2),)
    made = Compiled("train step", {"weights": 1}, {"gradients": 2}, 3, 4, None, lines, 5.0)
    assert compiling.from_json(json.loads(json.dumps(compiling.to_json(made)))) == made


def test_axes_have_links_of_their_own():
    lines = tuple(
        Traffic("all-gather", axes, 1, 1, seconds, 0, 1)
        for axes, seconds in ((("fsdp",), 2.0), (("tensor",), 1.5), (("fsdp", "tensor"), 1.0))
    )
    assert Compiled("", {}, {}, 0, 0, None, lines, 0.0).interconnect == 3.0


@needs_libtpu
@pytest.mark.parametrize("job", ["train", "generate"])
def test_a_plan_is_what_the_tpu_compiler_says(job: str):
    """Two layers on a v5e of four chips: what is kept by a step is there byte for byte."""
    options = {"batch": 16, "length": 128} if job == "train" else {"batch": 8, "prompt": 64, "cache_length": 256}
    made = plan(OPTConfig(**TINY), "v5e:2x2", job, mesh="fsdp=2,tensor=2" if job == "train" else "tensor=4", **options)
    assert made.fits and made.gathered_whole == 0
    for name, step in made.steps.items():
        for part, size in step.compiled.groups.items():
            assert part == "other" or size == step.work.memory[part], (name, part)
        assert step.compiled.peak >= step.compiled.arguments >= sum(step.compiled.groups.values()) - 64
    if job == "train":
        axes = {axis for line in made.main.compiled.traffic for axis in line.axes}
        assert axes == {"fsdp", "tensor"}
    else:
        lines = made.steps["decode step"].compiled.traffic
        # Two a layer, and one where the embedding, split over the vocabulary, is looked up.
        assert [(line.kind, line.axes, line.count) for line in lines] == [("all-reduce", ("tensor",), 5)]


@needs_libtpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_in_the_hosts_memory_are_not_the_devices(dtype: str):
    options = {"batch": 16, "length": 128, "mesh": "fsdp=2,tensor=2", "moments_dtype": dtype}
    config = OPTConfig(**{**TINY, "num_hidden_layers": 8})
    on_device, on_host = (
        plan(config, "v5e:2x2", "train", moments_memory=memory, **options).main.compiled
        for memory in ("device", "host")
    )
    moments = on_device.groups["optimizer state"]
    assert "optimizer state" not in on_host.groups
    assert on_host.peak < on_device.peak - 0.5 * moments


@pytest.mark.skipif(find_spec("jax_cuda12_plugin") is None, reason="needs XLA's compiler for GPUs: optjax[plan-gpu]")
def test_gpus_keep_no_second_copy_of_weights():
    """Laid out anew for its gathers, that of q, k, v and fc1 would be a seventh of all that there is."""
    sizes = {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 64}
    made = plan(OPTConfig(**{**TINY, **sizes}), "h100:8", mesh="fsdp=8", batch=8, length=128, micro_batches=1)
    assert made.fits and made.main.over < 1.1


BAD_JOB = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from optjax.sharding.plan.program import Program

def programs(config, placement):
    def lies(*spec):
        return NamedSharding(placement.mesh, P(*spec))
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=lies(None, ("data", "fsdp", "tensor")))
    step = jax.jit(lambda x: jax.lax.with_sharding_constraint(jnp.sin(x), lies("tensor", None)))
    return [Program("step", step, (x,), {"x": x})]
"""


@needs_libtpu
def test_arrays_that_are_gathered_whole_are_told(tmp_path, monkeypatch):
    (tmp_path / "bad_job.py").write_text(BAD_JOB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    config = OPTConfig(**TINY)
    request = make_request(config, "v5e:2x4", batch=8, length=128, mesh="data=2,fsdp=2,tensor=2")
    [step], gathered = asking.ask(
        config, request.topology, job="bad_job:programs", mesh=request.mesh, rules=request.rules, options={}
    )
    assert gathered == 1 and step.groups["x"] == 16 * 16 * 4 // 8


@needs_libtpu
def test_what_is_too_large_is_refused_by_the_tpu_compiler():
    config = OPTConfig(**{**TINY, "hidden_size": 8192, "ffn_dim": 32768, "num_hidden_layers": 12})
    made = plan(config, "v5e:1x1", "generate", batch=1, prompt=8, cache_length=16)
    assert not made.fits and made.steps["decode step"].compiled.refused and made.spare < 0
