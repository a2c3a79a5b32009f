"""The loop of every training script: steps, log, validation, checkpoints, and what to do when something goes wrong.

It knows nothing of what is trained: a `Job` has the functions. Whatever it decides it decides at fixed steps, from what
its checkpoints remember, so that a run that was killed at any moment goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from .checkpoint import Checkpoints, remember_run
from .divergence import Diverged, Event, Memory, Spikes, observe, remembered, rolled_back
from .interrupt import Interrupt
from .log import Log
from .meter import Meter
from .report import try_report
from .trace import Trace
from .tracking import make_trackers

# Steps handed to the device ahead of the one that is awaited: it never waits for the host, and the host not for it.
AHEAD = 2
# In a row; then the run ends rather than lose more.
FAILED_SAVES = 3


class Loader(Iterator[Any], Protocol):
    """An iterator of batches that knows where it is."""

    def get_state(self) -> dict[str, Any]:
        """The place in the data, as JSON: after the batches that were given out."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place."""
        ...

    def close(self) -> None:
        """Ends its threads or processes."""
        ...


def summarize(metrics: list[dict[str, float]]) -> dict[str, float]:
    """What the log says of some steps: means of those that were not skipped, the last learning rate and loss scale, and
    how many were skipped."""
    done = [m for m in metrics if not m.get("skipped", 0)] or metrics
    last, scaled = metrics[-1], any(m.get("loss_scale", 1.0) != 1.0 for m in metrics)
    entry = {name: float(np.mean([m[name] for m in done])) for name in last if name not in ("skipped", "loss_scale")}
    entry["lr"] = last["lr"]
    skipped = int(sum(m.get("skipped", 0) for m in metrics))
    return entry | ({"loss_scale": last["loss_scale"]} if scaled else {}) | ({"skipped": skipped} if skipped else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained.

    Attributes:
      target: the state as `jax.ShapeDtypeStruct` with shardings, to restore to. A state is a pytree dataclass with
        `.step` (int32 scalar, steps done) and `.guard.lr_scale` (float32 scalar).
      init: makes the state of step 0.
      step: ``(state, batch) -> (state, metrics)``; it places the loader's batch, compiles at its first call, may give
        the old state's buffers to the new one, and does not wait for the device. Metrics are scalars: `loss`,
        `grad_norm`, `lr`, and what else the log should have.
      loader: gives this process's part of every batch.
      about: what a run is, as JSON; a folder that holds another one is refused.
      tokens_per_step: of all processes together.
      flops_per_step: of all devices together; for the model FLOP/s utilization, where the device's peak is known.
      evaluate: validation figures of a state; the log puts ``validation_`` before their names.
      sample: texts of a state, for the log.
      better: ``("loss", "min")`` or ``("f1", "max")``: the validation figure whose best state is kept in `best/`.
      summarize: from the metrics of the steps since the last entry to the entry.
    """

    target: Any
    init: Callable[[], Any]
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    loader: Loader
    about: dict[str, Any]
    tokens_per_step: int
    flops_per_step: float | None = None
    evaluate: Callable[[Any], dict[str, float]] | None = None
    sample: Callable[[Any], list[str]] | None = None
    better: tuple[str, str] | None = None
    summarize: Callable[[list[dict[str, float]]], dict[str, float]] = summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How a run goes; steps count from its beginning, over all resumes. All of it may change on resume, though a run
    that changes `save_every`, `log_every` or `spikes` may decide differently about divergence.

    Attributes:
      total_steps: at which the run ends.
      stop_at: at which this call ends, earlier.
      save_every, eval_every, log_every: steps between checkpoints, validations and entries of the log.
      keep: checkpoints that stay; more if that many do not reach back beyond a spike.
      sample_every: steps between texts; by default at validations.
      profile: ``(first, count)``: steps to be traced into the folder `profile`.
      tensorboard: whether to write events for it, into `tensorboard`; by default if tensorboardX is installed.
      wandb: a project's name, to log to Weights & Biases.
      report: whether to draw `report.html` at the end, where matplotlib is installed.
      quiet: nothing on the terminal.
      spikes: what is divergence; None: only count what is skipped.

    Raises:
      ValueError: a number makes no sense.
    """

    total_steps: int
    stop_at: int | None = None
    save_every: int = 200
    keep: int = 2
    eval_every: int = 200
    log_every: int = 10
    sample_every: int | None = None
    profile: tuple[int, int] | None = None
    tensorboard: bool | None = None
    wandb: str | None = None
    report: bool = True
    quiet: bool = False
    spikes: Spikes | None = Spikes()

    def __post_init__(self):
        for name in ("total_steps", "save_every", "keep", "eval_every", "log_every", "sample_every", "stop_at"):
            value = getattr(self, name)
            if value is not None and (value < 1 and not (name in ("total_steps", "stop_at") and value == 0)):
                raise ValueError(f"{name} should be at least 1, not {value}")
        if self.profile is not None and (len(self.profile) != 2 or self.profile[0] < 1 or self.profile[1] < 1):
            raise ValueError(f"profile should be the first step and the number of steps, not {self.profile}")

    @property
    def last(self) -> int:
        return self.total_steps if self.stop_at is None else min(self.stop_at, self.total_steps)

    @property
    def kept(self) -> int:
        """Checkpoints to keep: one of them is from before any spike that is still undecided."""
        if self.spikes is None:
            return self.keep
        undecided = max(self.spikes.patience, self.spikes.max_skipped) + self.spikes.margin + self.log_every + 1
        return max(self.keep, -(-undecided // self.save_every) + 1)


def run(job: Job, folder: str | Path, options: LoopOptions) -> Any:
    """Trains until `options.last`, from the newest good checkpoint in `folder` if it has one; returns the state.

    SIGTERM and SIGINT end it early, with a checkpoint.

    Raises:
      ValueError: the folder holds another run, or no checkpoint in it can be read, or an option asks for a library that
        is not installed.
      Diverged: more often than `options.spikes` allows.
      OSError: checkpoints could not be saved, several times in a row or at the end.
    """
    trackers = make_trackers(folder, job.about, options.tensorboard, options.wandb)
    remember_run(folder, job.about)
    notes: list[str] = []
    with Checkpoints(folder, options.kept, options.save_every, notes.append) as checkpoints, Interrupt() as interrupt:
        loop = _Loop(job, Path(folder), options, checkpoints)
        position = loop.begin()
        with Log(folder, loop.done, options.last, options.quiet, position, trackers) as log:
            loop.log = log
            for note in notes:
                log.event(loop.done, "damaged", note)
            checkpoints.say = lambda note: log.event(loop.done, "damaged", note)
            try:
                loop.go(interrupt)
            finally:
                job.loader.close()
            if options.report and jax.process_index() == 0:
                log.say(try_report(folder))
    return loop.state


class _Loop:
    """A run under way."""

    log: Log

    def __init__(self, job: Job, folder: Path, options: LoopOptions, checkpoints: Checkpoints):
        self.job, self.folder, self.options, self.checkpoints = job, folder, options, checkpoints
        self.state: Any = None
        self.done = 0
        self.flying: list[tuple[int, dict[str, Any]]] = []  # metrics still on the device
        self.unlogged: list[tuple[int, dict[str, float]]] = []
        self.unjudged: list[tuple[int, dict[str, float]]] = []
        self.memory = Memory()
        self.best: float | None = None
        self.failed_saves = 0
        self.meter = Meter(job.tokens_per_step, job.flops_per_step)
        self.trace = Trace(folder / "profile", options.profile)

    def begin(self) -> int | None:
        """Makes or restores the state; returns the log's position then, if it is known."""
        if self.checkpoints.latest is None:
            self.state = self.job.init()
            return 0
        found = self.checkpoints.resume(self.job.target)
        self.state = found.state
        self.done = int(found.state.step)
        self.job.loader.set_state(found.loader)
        self.memory = remembered(found.loop["memory"])
        self.unlogged = [(step, metrics) for step, metrics in found.loop["unlogged"]]
        self.unjudged = [(step, metrics) for step, metrics in found.loop["unjudged"]]
        self.best = found.loop["best"]
        return found.loop["log"]

    def go(self, interrupt: Interrupt) -> None:
        options = self.options
        while self.done < options.last:
            self.trace.before(self.done + 1)
            self.state, metrics = self.job.step(self.state, next(self.job.loader))
            self.done += 1
            self.flying.append((self.done, metrics))
            if len(self.flying) > AHEAD:
                jax.block_until_ready(self.flying[-1 - AHEAD][1])
            if not self.meter.started:  # the first step compiles
                jax.block_until_ready(metrics)
                self.meter.start(self.done)
            self.trace.after(self.done, metrics)
            self.log.at(self.done)
            stops = interrupt.received()  # asked once: a signal may come at any line below
            # The last entry is written while the device is at the step after it; the steps up to there are judged then.
            before = self.done - 1
            if before and before % options.log_every == 0:
                self.fetch(before)
                self.write(before)
                if self.judge(before):
                    continue
            ended = self.done == options.total_steps
            validates = self.done % options.eval_every == 0 or ended
            samples = self.done % (options.sample_every or options.eval_every) == 0 or ended
            saves = self.done % options.save_every == 0 or self.done == options.last
            if validates or samples or saves or stops:
                self.fetch(self.done)
                if ended and self.judge(self.done):
                    continue
                if validates or samples or self.done % options.log_every == 0:
                    self.write(self.done, self.look(validates, samples))
                if saves or stops:
                    self.save(at_the_end=stops or self.done == options.last)
                self.meter.start(self.done)
            if stops:
                if not ended:
                    self.log.say(f"stopped after step {self.done}; the same command goes on from there")
                break
        self.trace.stop()

    def fetch(self, through: int) -> None:
        """Brings the metrics of the steps up to `through` from the device."""
        due = [each for each in self.flying if each[0] <= through]
        self.flying = self.flying[len(due) :]
        for step, metrics in jax.device_get(due):
            record = (int(step), {name: float(value) for name, value in metrics.items()})
            self.unlogged.append(record)
            self.unjudged.append(record)

    def write(self, step: int, more: dict[str, Any] | None = None) -> None:
        """An entry of the steps since the last one, if there are any."""
        if self.unlogged:
            entry = {"step": step} | self.job.summarize([m for _, m in self.unlogged]) | self.meter.read(step)
            self.log.write(entry | (more or {}))
            self.unlogged = []

    def look(self, validates: bool, samples: bool) -> dict[str, Any]:
        """Validation figures and texts of the state, and a copy of it if it is the best so far."""
        entry: dict[str, Any] = {}
        if validates and self.job.evaluate is not None:
            found = {name: float(value) for name, value in self.job.evaluate(self.state).items()}
            entry = {f"validation_{name}": value for name, value in found.items()}
            if self.job.better is not None:
                self.keep_best(found)
        if samples and self.job.sample is not None:
            entry["samples"] = self.job.sample(self.state)
        return entry

    def keep_best(self, found: dict[str, float]) -> None:
        name, mode = self.job.better or ("", "")
        if name not in found:
            raise ValueError(f"the best checkpoint is to be that of the {mode} {name!r}, but there are {sorted(found)}")
        better = self.best is None or (found[name] < self.best if mode == "min" else found[name] > self.best)
        if better and np.isfinite(found[name]):
            try:
                with Checkpoints(self.folder, keep=1, name="best") as best:
                    best.replace(self.state, {}, {"step": self.done, **found})
                self.best = found[name]
            except Exception as error:
                self.save_failed(error, raises=False)

    def judge(self, through: int) -> bool:
        """Looks at the steps up to `through`; whether the run was rolled back."""
        if self.options.spikes is None:
            self.unjudged = []
            return False
        while self.unjudged and self.unjudged[0][0] <= through:
            step, metrics = self.unjudged.pop(0)
            self.memory, event = observe(self.options.spikes, self.memory, step, metrics)
            if event is not None:
                self.roll_back(event, self.options.spikes)
                return True
        return False

    def roll_back(self, event: Event, spikes: Spikes) -> None:
        """Back to a checkpoint from before the event; the data goes on where it is."""
        about = dataclasses.asdict(event) | {"event": event.kind}
        about = {name: value for name, value in about.items() if name not in ("kind", "step")}
        kind = about.pop("event")
        if event.number > spikes.max_events:
            text = f"{event}. That is the {event.number}th time; the run gives up"
            self.log.event(self.done, "gave up", text, kind=kind, **about)
            raise Diverged(f"{text}. Look at the data around that step, or take a lower learning rate")
        self.flying, self.unlogged, self.unjudged, self.state = [], [], [], None
        self.settle()
        every = self.options.save_every
        steps = self.checkpoints.steps
        good = [step for step in steps if step % every == 0 and step + spikes.margin < event.first]
        if good:
            found = self.checkpoints.resume(self.job.target, good)
            state, saved = found.state, remembered(found.loop["memory"])
        else:
            state, saved = self.job.init(), Memory()
        at, self.done = self.done, int(state.step)
        for step in reversed(steps):
            if step > self.done:
                self.checkpoints.remove(step)
        self.memory = rolled_back(self.memory, saved)
        self.state = scale_lr(state, self.memory.lr_scale)
        text = f"{event}: back to step {self.done}, and on with other data"
        if self.memory.lr_scale != 1.0:
            text += f", at {self.memory.lr_scale:g} of the learning rate"
        self.log.event(at, "rollback", text, kind=kind, back_to=self.done, **about)
        self.meter.start(self.done)

    def save(self, at_the_end: bool) -> None:
        self.settle()
        loop = {
            "memory": dataclasses.asdict(self.memory),
            "unlogged": self.unlogged,
            "unjudged": self.unjudged,
            "best": self.best,
            "log": self.log.position,
        }
        try:
            self.checkpoints.save(self.state, self.job.loader.get_state(), loop)
            if at_the_end:
                self.checkpoints.wait()
        except Exception as error:
            self.save_failed(error, at_the_end)

    def settle(self) -> None:
        """Waits for the checkpoint that is being saved."""
        try:
            if self.checkpoints.wait():
                self.failed_saves = 0
        except Exception as error:
            self.save_failed(error)

    def save_failed(self, error: Exception, raises: bool = False) -> None:
        """A full disk, most often: training goes on, and the checkpoints that are there stay."""
        self.failed_saves += 1
        self.checkpoints.sweep()
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
        text = f"a checkpoint could not be saved ({why}); the last good one is of step {self.checkpoints.latest}"
        self.log.event(self.done, "save failed", text)
        if raises or self.failed_saves >= FAILED_SAVES:
            raise OSError(f"{text}. Make room in {self.folder}; the same command goes on from there") from error


def scale_lr(state: Any, scale: float) -> Any:
    """The state with that `guard.lr_scale`."""
    before = state.guard.lr_scale
    value = np.asarray(scale, before.dtype)
    scaled = jax.make_array_from_callback(before.shape, before.sharding, lambda index: value[index])
    return dataclasses.replace(state, guard=dataclasses.replace(state.guard, lr_scale=scaled))
