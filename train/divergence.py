"""When a run diverges, and what is done about it: a state machine over the losses and gradient norms of its steps.

A step whose loss or gradients are not finite changes no weight: the step itself sees to that. Here such steps are
counted, and every other is compared with the ones before it. An event is

- a loss spike: `patience` steps in a row whose loss is more than ``threshold`` robust standard deviations (1.4826
  times the median distance from the median) above the median of the last `window` ordinary steps, and at least
  ``least_rise`` of that median, and 0.1 nats, above it;
- a gradient spike: the same of the logarithm of the gradient's norm, with at least a factor of ``least_growth``;
- `max_skipped` steps in a row that are not finite. Steps that a dynamic loss scale leaves out while it looks for its
  place do not count: their loss is finite, and the scale is above 1.

A single strange batch is therefore no event, as the loss is measured before the update and the gradient is clipped. At
an event the loop goes back to a checkpoint from before it, and goes on with other data. From the `lower_after`-th event
within `memory` steps on, each event lowers the learning rate as well, by ``lr_factor``; after more than `max_events`
the run gives up. OPT's authors went back and lowered the rate by hand (Zhang et al. 2022, section 2.5); PaLM's went
back and skipped the data around a spike (Chowdhery et al. 2022, section 5.1).

Everything here is a pure function of what was observed: a run that is killed and goes on decides the same.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


class Diverged(RuntimeError):
    """The run diverged more often than its options allow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spikes:
    """What counts as divergence, and what follows; see the module. Steps are counted, none is a time.

    Attributes:
      window: ordinary steps that a step is compared with.
      least: before there are so many of them, nothing is a spike.
      threshold: robust standard deviations above the median.
      least_rise: of the median loss.
      least_growth: of the median gradient norm.
      patience: outliers in a row that make a spike.
      max_skipped: steps in a row that are not finite.
      margin: a checkpoint is good if it lies more than so many steps before the first outlier.
      lower_after: the event of so many, within `memory` steps, that lowers the learning rate.
      memory: steps, those that were rolled back among them.
      lr_factor: of the learning rate, at each such event.
      max_events: in all; the next one ends the run with `Diverged`.

    Raises:
      ValueError: a number makes no sense.
    """

    window: int = 128
    least: int = 32
    threshold: float = 8.0
    least_rise: float = 0.1
    least_growth: float = 4.0
    patience: int = 4
    max_skipped: int = 10
    margin: int = 10
    lower_after: int = 2
    memory: int = 2000
    lr_factor: float = 0.5
    max_events: int = 10

    def __post_init__(self):
        counts = ("window", "least", "patience", "max_skipped", "lower_after", "memory")
        wrong = [name for name in counts if getattr(self, name) < 1]
        if wrong or self.margin < 0 or self.max_events < 0 or self.least > self.window:
            raise ValueError(
                f"{', '.join(wrong) or 'margin, max_events and least'} of the spikes to look for should be at least 1 "
                f"(margin and max_events 0) and least at most window; got {self}"
            )
        if not (self.threshold > 0 and self.least_rise >= 0 and self.least_growth >= 1 and 0 < self.lr_factor <= 1):
            raise ValueError(f"threshold should be > 0, least_growth >= 1 and lr_factor in (0, 1]; got {self}")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the watcher knows; JSON by `dataclasses.asdict` and `remembered`.

    Attributes:
      losses, norms: of the last ordinary steps; norms as logarithms.
      loss_outliers, norm_outliers, skipped: in a row, up to now.
      first: the step at which the longest of those rows began.
      seen: steps observed, those that were rolled back among them.
      events: `seen` at each event.
      lr_scale: what the learning rate is multiplied by.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    loss_outliers: int = 0
    norm_outliers: int = 0
    skipped: int = 0
    first: int | None = None
    seen: int = 0
    events: tuple[int, ...] = ()
    lr_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Event:
    """A divergence: ``kind`` is ``loss spike``, ``gradient spike`` or ``not finite``; ``first`` its first step,
    ``value`` the last loss or norm, ``usual`` the median before. ``lr_scale`` is the one to go on with."""

    kind: str
    step: int
    first: int
    value: float
    usual: float | None
    number: int
    lr_scale: float

    def __str__(self) -> str:
        kind = "loss or gradients are not finite" if self.kind == "not finite" else self.kind
        usual = "" if self.usual is None else f", usually {self.usual:.4g}"
        return f"{kind} from step {self.first} to {self.step} (now {self.value:.4g}{usual})"


def remembered(saved: dict[str, Any]) -> Memory:
    """A memory from its JSON."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return Memory(**given)


def observe(spikes: Spikes, memory: Memory, step: int, metrics: dict[str, float]) -> tuple[Memory, Event | None]:
    """Takes note of one step: ``metrics`` has `loss` and `grad_norm`, and may have `skipped` and `loss_scale`."""
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    finite = math.isfinite(loss) and math.isfinite(norm) and not metrics.get("skipped", 0)
    if not finite:
        scaling = math.isfinite(loss) and metrics.get("loss_scale", 1.0) > 1.0
        change: dict[str, Any] = {"skipped": memory.skipped + (not scaling)}
    else:
        loss_out = _outlier(spikes, memory.losses, loss, max(spikes.least_rise * abs(_median(memory.losses)), 0.1))
        log_norm = math.log(max(norm, 1e-30))
        norm_out = _outlier(spikes, memory.norms, log_norm, math.log(spikes.least_growth))
        change = {
            "skipped": 0,
            "loss_outliers": memory.loss_outliers + 1 if loss_out else 0,
            "norm_outliers": memory.norm_outliers + 1 if norm_out else 0,
        }
        if not (loss_out or norm_out):
            change["losses"] = (*memory.losses, loss)[-spikes.window :]
            change["norms"] = (*memory.norms, log_norm)[-spikes.window :]
    after = dataclasses.replace(memory, **change, seen=memory.seen + 1)
    if after.skipped or after.loss_outliers or after.norm_outliers:
        first = step if memory.first is None else memory.first
    else:
        first = None
    after = dataclasses.replace(after, first=first)
    if after.skipped >= spikes.max_skipped:
        return _event(spikes, after, "not finite", step, loss if not math.isfinite(loss) else norm, None)
    if after.loss_outliers >= spikes.patience:
        return _event(spikes, after, "loss spike", step, loss, _median(memory.losses))
    if after.norm_outliers >= spikes.patience:
        return _event(spikes, after, "gradient spike", step, norm, math.exp(_median(memory.norms)))
    return after, None


def rolled_back(memory: Memory, saved: Memory) -> Memory:
    """After an event: the ordinary steps that the checkpoint knew, and the events that it could not."""
    return dataclasses.replace(
        saved, skipped=0, loss_outliers=0, norm_outliers=0, first=None,
        seen=memory.seen, events=memory.events, lr_scale=memory.lr_scale,
    )  # fmt: skip


def _event(
    spikes: Spikes, memory: Memory, kind: str, step: int, value: float, usual: float | None
) -> tuple[Memory, Event]:
    events = (*memory.events, memory.seen)
    recent = sum(memory.seen - each < spikes.memory for each in events)
    scale = memory.lr_scale * (spikes.lr_factor if recent >= spikes.lower_after else 1.0)
    assert memory.first is not None
    event = Event(kind, step, memory.first, value, usual, len(events), scale)
    return dataclasses.replace(memory, events=events, lr_scale=scale), event


def _outlier(spikes: Spikes, ordinary: tuple[float, ...], value: float, least: float) -> bool:
    if len(ordinary) < spikes.least:
        return False
    median = _median(ordinary)
    spread = 1.4826 * float(np.median(np.abs(np.array(ordinary) - median)))
    return value - median > max(spikes.threshold * spread, least)


def _median(values: tuple[float, ...]) -> float:
    return float(np.median(values)) if values else 0.0
