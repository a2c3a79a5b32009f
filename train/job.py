"""What the training loop is given: a job, which has the functions, and how its run should go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from .divergence import Spikes


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
