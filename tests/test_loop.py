"""The training loop, on a small job of its own: what it logs, saves, decides and survives."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from loop_job import SPIKES, make_job, options

from optjax.train.checkpoint import Checkpoints, restore_best
from optjax.train.divergence import Diverged
from optjax.train.interrupt import Interrupt
from optjax.train.log import read_events, read_log
from optjax.train.loop import run
from optjax.train.report import main as report


def leaves(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same(one, other) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def figures(folder) -> list[tuple]:
    """What of a log is the same for the same run."""
    return [(e["step"], e["loss"], e["grad_norm"], e["lr"]) for e in read_log(folder, everything=True)]


def saved(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_run_in_parts_is_the_run_in_one(tmp_path):
    """Stopped off and on the grid of checkpoints and log; the entries are the same too."""
    whole = run(make_job(), tmp_path / "whole", options())
    for stop in (3, 8, 9, None):
        job = make_job()
        parts = run(job, tmp_path / "parts", options(stop_at=stop))
        assert int(parts.step) == (stop or 12) and job.loader.closed
    assert_same(whole, parts)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert [entry[0] for entry in figures(tmp_path / "parts")] == [2, 4, 6, 8, 10, 12]
    assert not read_events(tmp_path / "parts")
    # As many as a rollback needs, and not those where the run was stopped.
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole") == [4, 8, 12]


def test_a_checkpoint_holds_what_the_state_was(tmp_path):
    """Written while the next steps give its buffers away: on a CPU a copy to the host may be the buffer itself."""
    shape = (64, 1024, 64)  # 16 MB: writing takes many steps' time

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class State:
        weights: jax.Array
        step: jax.Array

    forward = jax.jit(lambda s: State(s.weights + 1, s.step + 1), donate_argnums=0)
    state = State(jnp.zeros(shape), jnp.zeros((), jnp.int32))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for _ in range(3):
            state = forward(state)
            checkpoints.save(state)
            for _ in range(3):
                state = forward(state)
        checkpoints.wait()
        for step in (1, 5, 9):
            found = checkpoints.resume(target, [step]).state
            assert int(found.step) == step and (np.asarray(found.weights) == step).all()


# Of batches 0, 1, …: step n takes batch n - 1. The factor makes a loss and gradients that no window has seen.
PLANTED = {9: 30.0, 10: 30.0, 11: 30.0}


def test_a_spike_rolls_back_and_skips_the_data(tmp_path):
    """Steps 10 to 12 are bad: back to step 8, although 12 was saved too, and on with the batches after those seen."""
    folder = tmp_path / "run"
    job = make_job(PLANTED)
    state = run(job, folder, options(total_steps=20))
    [event] = read_events(folder)
    assert (event["event"], event["kind"], event["first"], event["back_to"]) == ("rollback", "loss spike", 10, 8)
    assert "back to step 8" in event["text"] and event["step"] == 13 and event["lr_scale"] == 1.0
    assert job.loader.place == 20 + 5 and int(state.step) == 20
    # A run that had been at step 8, and then had that data, is the same run.
    other = tmp_path / "other"
    run(make_job(), other, options(total_steps=20, stop_at=8))
    clean = make_job()

    def skip(place):
        clean.loader.place = place["place"] + 5

    clean.loader.set_state = skip
    assert_same(state, run(clean, other, options(total_steps=20)))
    assert [entry["step"] for entry in read_log(folder)] == list(range(2, 21, 2))
    assert [e["step"] for e in read_log(folder, everything=True)] == [*range(2, 13, 2), *range(10, 21, 2)]


def test_repeated_spikes_lower_the_rate_and_at_last_the_run_gives_up(tmp_path):
    planted = {n: 30.0 for start in (9, 21, 34) for n in range(start, start + 4)}
    state = run(make_job(planted), tmp_path / "saved", options(total_steps=40))
    events = read_events(tmp_path / "saved")
    assert [event["lr_scale"] for event in events] == [1.0, 0.5, 0.25] and float(state.guard.lr_scale) == 0.25
    assert read_log(tmp_path / "saved")[-1]["lr"] == pytest.approx(0.25 * 0.02)
    spikes = dataclasses.replace(SPIKES, max_events=2)
    with pytest.raises(Diverged, match="3th time|third time|gives up"):
        run(make_job(planted), tmp_path / "lost", options(total_steps=40, spikes=spikes))
    assert [event["event"] for event in read_events(tmp_path / "lost")] == ["rollback", "rollback", "gave up"]
    # Killed after that, or stopped on the way, it decides the same again.
    for stop in (6, 11, 15, 26, 31):
        run(make_job(planted), tmp_path / "parts", options(total_steps=40, stop_at=stop))
    assert_same(state, run(make_job(planted), tmp_path / "parts", options(total_steps=40)))
    assert figures(tmp_path / "parts") == figures(tmp_path / "saved")


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path):
    """One or two change no weight; three in a row are an event, which goes back to before them."""
    state = run(make_job({5: np.nan, 6: np.inf}), tmp_path / "few", options())
    assert not read_events(tmp_path / "few") and int(state.step) == 12
    assert [entry.get("skipped", 0) for entry in read_log(tmp_path / "few")] == [0, 0, 1, 1, 0, 0]
    assert all(np.isfinite(entry["loss"]) for entry in read_log(tmp_path / "few"))
    state = run(make_job({n: np.nan for n in (6, 7, 8)}), tmp_path / "many", options())
    [event] = read_events(tmp_path / "many")
    assert (event["kind"], event["first"], event["back_to"]) == ("not finite", 7, 4)
    assert all(np.isfinite(leaf).all() for leaf in leaves(state))


def damage(folder, kind: str) -> None:
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if kind == "truncated":
        with open(largest, "r+b") as file:
            file.truncate(largest.stat().st_size // 2)
    elif kind == "missing":
        largest.unlink()
    elif kind == "unlisted":  # killed before its files were listed: only reading it tells
        (folder / "sizes.json").unlink()
        damage(folder, "truncated")
    elif kind == "another place":  # in the data, of which nobody else would know
        file = folder / "loader" / "metadata"
        file.write_text(re.sub(r"\d", lambda digit: str(9 - int(digit[0])), file.read_text(), count=1))
    else:
        (folder / "loop" / "metadata").write_text("{")
        (folder / "sizes.json").unlink()


# Where one array cannot be read, orbax drops the reads of the others while they go on.
dropped_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dropped_reads
@pytest.mark.parametrize("kind", ["truncated", "missing", "unlisted", "another place", "no json"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, kind, capsys):
    whole = run(make_job(), tmp_path / "whole", options(total_steps=16))
    run(make_job(), tmp_path / "run", options(total_steps=16, stop_at=12))
    damage(tmp_path / "run" / "checkpoints" / "12", kind)
    state = run(make_job(), tmp_path / "run", options(total_steps=16, quiet=False))
    assert_same(state, whole)
    [event] = read_events(tmp_path / "run")
    assert event["event"] == "damaged" and event["step"] == 8
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint of step 12 is damaged" in said and "going on from step 8" in said
    assert (tmp_path / "run" / "damaged" / "12").is_dir() and saved(tmp_path / "run") == [8, 12, 16]


@dropped_reads
def test_a_rollback_passes_over_a_damaged_checkpoint(tmp_path):
    job = make_job(PLANTED)
    counted = itertools.count(1)

    def step(state, batch):
        if next(counted) == 13:
            damage(tmp_path / "checkpoints" / "8", "truncated")
        return job.step(state, batch)

    state = run(dataclasses.replace(job, step=step), tmp_path, options(total_steps=20))
    assert int(state.step) == 20 and (tmp_path / "damaged" / "8").is_dir()
    assert [(event["event"], event.get("back_to")) for event in read_events(tmp_path)] == [
        ("damaged", None),
        ("rollback", 4),
    ]


@dropped_reads
def test_who_only_reads_leaves_all_as_it_is(tmp_path, caplog):
    """A save under way and a damaged checkpoint: the run that the folder belongs to may be going on."""
    job = make_job()
    run(job, tmp_path, options(stop_at=8))
    under_way = tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp"
    under_way.mkdir()
    damage(tmp_path / "checkpoints" / "8", "unlisted")
    said = []
    with Checkpoints(tmp_path, say=said.append, read_only=True) as checkpoints:
        assert int(checkpoints.restore(job.target).step) == 4
    assert "step 8 is damaged" in said[0] and saved(tmp_path) == [4, 8] and under_way.is_dir()
    assert not [message for message in caplog.messages if "read" in message]
    with pytest.raises(FileNotFoundError, match="no checkpoint in"), Checkpoints(tmp_path / "no", read_only=True) as no:
        no.restore(job.target)
    assert not (tmp_path / "no").exists()
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        checkpoints.restore(job.target)
    assert saved(tmp_path) == [4] and not under_way.exists()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    run(make_job(), tmp_path, options(stop_at=8))
    for step in (4, 8):
        damage(tmp_path / "checkpoints" / str(step), "truncated")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read: step 8.*step 4"):
        run(make_job(), tmp_path, options())
    assert saved(tmp_path) == [4, 8]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where those may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@dropped_reads
def test_a_full_disk_stops_no_training_and_loses_no_checkpoint(tmp_path, small_disk):
    """No room for a third checkpoint, until a file that takes it all goes away."""
    whole = run(make_job(), tmp_path / "whole", options(total_steps=24))
    folder, ballast = small_disk / "run", small_disk / "ballast"
    run(make_job(), folder, options(total_steps=24, stop_at=8))
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 8192))
    job = make_job()
    counted = itertools.count(9)

    def step(state, batch):
        if next(counted) == 19:
            ballast.unlink()
        return job.step(state, batch)

    assert_same(whole, run(dataclasses.replace(job, step=step), folder, options(total_steps=24)))
    events = read_events(folder)
    assert [event["event"] for event in events] == ["save failed"] * 2, events
    assert all("space" in event["text"] and "of step 8" in event["text"] for event in events)
    assert saved(folder)[-2:] == [20, 24] and figures(folder) == figures(tmp_path / "whole")
    # And if nobody makes room the run ends, says so, and goes on later.
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 8192))
    with pytest.raises(OSError, match="could not be saved.*of step 24. Make room in"):
        run(make_job(), folder, options(total_steps=60))
    assert saved(folder)[-1] == 24
    ballast.unlink()
    assert int(run(make_job(), folder, options(total_steps=28)).step) == 28


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = {3: 0.5, 6: 0.9, 9: 0.7, 12: 0.8}

    def evaluate(state):
        return {"f1": scores[int(state.step)], "loss": 1.0}

    job = make_job(evaluate=evaluate, better=("f1", "max"))
    at_six = run(make_job(), tmp_path / "six", options(stop_at=6, eval_every=3))
    for stop in (7, None):
        run(dataclasses.replace(job, loader=make_job().loader), tmp_path / "run", options(eval_every=3, stop_at=stop))
    best = restore_best(tmp_path / "run", job.target)
    assert best.loop == {"step": 6, "f1": 0.9, "loss": 1.0}
    assert_same(best.state, at_six)
    assert restore_best(tmp_path / "six", job.target) is None
    with pytest.raises(ValueError, match="best.*'f2'.*f1"):
        run(make_job(evaluate=evaluate, better=("f2", "max")), tmp_path / "wrong", options(eval_every=3))


def test_the_best_checkpoint_may_be_of_an_earlier_step_after_a_rollback(tmp_path):
    scores = iter([5.0, 4.0, 3.0, 2.0, 1.0, 9.0, 9.0, 9.0, 9.0])
    seen = []

    def evaluate(state):
        seen.append((next(scores), int(state.step)))
        return {"loss": seen[-1][0]}

    job = make_job(PLANTED, evaluate=evaluate, better=("loss", "min"))
    run(job, tmp_path, options(total_steps=20, eval_every=3))
    assert seen[3][1] > seen[4][1], seen
    assert restore_best(tmp_path, job.target).loop == {"step": seen[4][1], "loss": 1.0}
    assert [path.name for path in (tmp_path / "best").iterdir() if path.name.isdecimal()] == [str(seen[4][1])]


def test_where_the_best_checkpoint_had_to_make_way_and_the_next_fails_another_is_kept(tmp_path, monkeypatch):
    """The best one of step 12 goes for one of step 9, after a rollback, for which the disk has no room."""
    scores = iter([5.0, 4.0, 3.0, 2.0, 1.0, 2.5, 9.0, 9.0, 9.0])
    save = Checkpoints.save

    def no_room(self, state, loader=None, loop=None):
        if loop and loop.get("loss") == 1.0:
            raise OSError("no space left")
        return save(self, state, loader, loop)

    monkeypatch.setattr(Checkpoints, "save", no_room)
    job = make_job(PLANTED, evaluate=lambda state: {"loss": next(scores)}, better=("loss", "min"))
    run(job, tmp_path, options(total_steps=20, eval_every=3))
    assert restore_best(tmp_path, job.target).loop == {"step": 12, "loss": 2.5}


def test_processes_that_agreed_to_stop_do_not_forget_it(monkeypatch):
    """The service says so at one step, which may be one that is rolled back."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 3)
    interrupt = Interrupt()
    assert [interrupt.received() for _ in range(5)] == [False, False, True, True, True] and asked == [1, 2, 3]


def test_tensorboard_reads_what_was_written(tmp_path):
    """By TensorBoard's own reader; what a rollback takes back is gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(PLANTED, evaluate=lambda state: {"loss": 2.0}, sample=lambda state: ["Once <upon> a time"])
    run(job, tmp_path, options(total_steps=20, tensorboard=True, stop_at=9))
    job = dataclasses.replace(job, loader=make_job(PLANTED).loader)
    run(job, tmp_path, options(total_steps=20, tensorboard=True))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    for name in ("loss", "grad_norm", "lr"):
        found = {each.step: each.value for each in read.Scalars(f"train/{name}")}
        assert found == {entry["step"]: pytest.approx(entry[name], rel=1e-6) for entry in read_log(tmp_path)}
    assert [each.step for each in read.Scalars("validation/loss")] == [6, 12, 18, 20]
    assert b"Once" in read.Tensors("sample/0/text_summary")[-1].tensor_proto.string_val[0]


class FakeRun(list):
    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, entry):
        self.append(entry)

    def finish(self):
        self.append("finished")


def test_wandb_gets_entries_and_the_same_run_after_a_resume(tmp_path, monkeypatch):
    runs = []

    def init(**given):
        runs.append((given, FakeRun()))
        return runs[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=None))
    for stop in (4, None):
        run(make_job(), tmp_path, options(wandb="opt", stop_at=stop))
    assert [given["project"] for given, _ in runs] == ["opt", "opt"] and runs[0][0]["id"] == runs[1][0]["id"]
    assert all(given["resume"] == "allow" and given["config"] == {"toy": 1} for given, _ in runs)
    entries = [entry for _, each in runs for entry in each]
    assert [entry if entry == "finished" else entry["step"] for entry in entries] == [
        2, 4, "finished", 6, 8, 10, 12, "finished",
    ]  # fmt: skip
    assert entries[0]["train/loss"] == read_log(tmp_path)[0]["loss"]


def test_what_is_not_installed_is_said_before_anything_is_made(tmp_path, monkeypatch):
    for name, value in (("tensorboard", True), ("wandb", "opt")):
        monkeypatch.setattr("optjax.train.tracking._is_installed", lambda module: False)
        with pytest.raises(ValueError, match=rf"pip install 'optjax\[{name}\]'"):
            run(make_job(), tmp_path / "run", options(**{name: value}))
    assert not (tmp_path / "run").exists()
    run(make_job(), tmp_path / "run", options(tensorboard=None))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_report_is_one_file_and_tells_what_happened(tmp_path, capsys):
    job = make_job(PLANTED, evaluate=lambda state: {"loss": 2.0}, sample=lambda state: ["Once <upon> a time"])
    run(job, tmp_path, options(total_steps=20, report=True))
    page = (tmp_path / "report.html").read_text()
    assert "back to step 8" in page and "Once &lt;upon&gt; a time" in page and "<svg" in page
    assert "gradient norm" in page and "validation" in page
    assert "src=" not in page and "<script" not in page and "<link" not in page
    report([str(tmp_path)])
    assert (tmp_path / "report.html").read_text() == page
    for name in ("curves.png", "again.png", "curves.svg"):
        report([str(tmp_path), "--picture", str(tmp_path / name)])
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "curves.svg").read_text()
    assert svg[svg.index("<svg") :] in page
    for words, said in (
        ([tmp_path / "nowhere"], "no entries"),
        ([tmp_path, "--picture", "curves.gif"], "a picture is .png or .svg"),
    ):
        with pytest.raises(SystemExit):
            report([str(word) for word in words])
        assert said in capsys.readouterr().err


def test_a_trace_of_the_steps_asked_for(tmp_path):
    run(make_job(), tmp_path, options(profile=(5, 2)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_lines_for_a_reader(tmp_path, capsys):
    run(make_job(evaluate=lambda state: {"loss": 2.0, "perplexity": 7.4}), tmp_path, options(quiet=False))
    said = capsys.readouterr().err
    assert "step 2: loss" in said and "tokens/s" in said and "validation loss 2.0000, perplexity 7.4000" in said
    assert said.count("step ") >= 6


@pytest.mark.parametrize("wrong", [{"save_every": 0}, {"log_every": -1}, {"keep": 0}, {"profile": (0, 2)}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="should be"):
        options(**wrong)
