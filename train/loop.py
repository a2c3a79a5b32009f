"""The loop of every training script: steps, log, validation, checkpoints, and what to do when something goes wrong.

It knows nothing of what is trained: a `Job` has the functions. Whatever it decides it decides at fixed steps, from what
its checkpoints remember, so that a run that was killed at any moment goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .checkpoint import Checkpoints
from .divergence import Diverged, Event, Memory, Spikes, observe, remembered, rolled_back
from .interrupt import Interrupt
from .job import Job, LoopOptions
from .log import Log
from .meter import Meter
from .report import try_report
from .run_file import remember_run
from .trace import Trace
from .tracking import make_trackers

# Steps handed to the device ahead of the one that is awaited: it never waits for the host, and the host not for it.
AHEAD = 2
# In a row; then the run ends rather than lose more.
FAILED_SAVES = 3


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
                if not any(path.name.isdecimal() for path in self.folder.glob("best/*")):
                    self.best = None  # what was best had to make way, and the next one is
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
        good = [step for step in self.checkpoints.steps if step % every == 0 and step + spikes.margin < event.first]
        if good:
            found = self.checkpoints.resume(self.job.target, good)
            state, saved = found.state, remembered(found.loop["memory"])
        else:
            state, saved = self.job.init(), Memory()
        at, self.done = self.done, int(state.step)
        for step in reversed(self.checkpoints.steps):  # without those that were damaged
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
