"""Where figures go besides `log.jsonl`: TensorBoard and Weights & Biases, each an extra of the package."""

from __future__ import annotations

import importlib.util
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

import jax


class Tracker(Protocol):
    """Takes what the log takes; used by the first process only."""

    def begin(self, step: int) -> None:
        """Entries after `step` follow; those of later steps that were written before do not count any more."""
        ...

    def write(self, entry: dict[str, Any]) -> None:
        """An entry of the log."""
        ...

    def event(self, step: int, text: str) -> None:
        """Something happened."""
        ...

    def end(self) -> None:
        """Nothing follows."""
        ...


def make_trackers(
    folder: str | Path, about: dict[str, Any], tensorboard: bool | None, wandb: str | None
) -> list[Tracker]:
    """The trackers asked for; ``tensorboard=None`` is yes if it is installed.

    Raises:
      ValueError: one of them is not installed; the message has the extra's name.
    """
    for wanted, module, extra in ((tensorboard, "tensorboardX", "tensorboard"), (wandb, "wandb", "wandb")):
        if wanted and not _is_installed(module):
            raise ValueError(f"{module} is not installed; pip install 'optjax[{extra}]', or leave {extra} out")
    if jax.process_index() > 0:
        return []
    trackers: list[Tracker] = []
    if tensorboard or (tensorboard is None and _is_installed("tensorboardX")):
        trackers.append(TensorBoard(folder))
    if wandb:
        trackers.append(WandB(folder, wandb, about))
    return trackers


def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def figures(entry: dict[str, Any]) -> dict[str, float]:
    """An entry's numbers, by the names they have on dashboards: ``train/loss``, ``validation/loss``."""
    found = {}
    for name, value in entry.items():
        if name not in ("step", "time") and isinstance(value, int | float):
            group, _, rest = name.partition("_")
            found[f"validation/{rest}" if group == "validation" else f"train/{name}"] = float(value)
    return found


class TensorBoard:
    """Event files in the run's folder `tensorboard`, by tensorboardX: without its `SummaryWriter`, whose thread would
    hold the run up for ever once the disk is full."""

    def __init__(self, folder: str | Path):
        self._folder, self._file = Path(folder) / "tensorboard", None

    def begin(self, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Its own name has the second only, and a run that resumes at once would write over what is there.
            self._file = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        # TensorBoard leaves out what it read before of this step and later ones.
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, entry: dict[str, Any]) -> None:
        from tensorboardX import summary

        for name, value in figures(entry).items():
            self._add(entry["step"], summary=summary.scalar(name, value))
        for i, text in enumerate(entry.get("samples", ())):
            self._add(entry["step"], summary=summary.text(f"sample/{i}", text))

    def event(self, step: int, text: str) -> None:
        from tensorboardX import summary

        self._add(step, summary=summary.text("event", text))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        assert self._file is not None
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
        self._file.flush()

    def end(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class WandB:
    """A run of Weights & Biases, the same one after every resume."""

    def __init__(self, folder: str | Path, project: str, about: dict[str, Any]):
        self._folder, self._project, self._about, self._run = Path(folder), project, about, None

    def begin(self, step: int) -> None:
        if self._run is not None:  # steps are figures like others there: nothing is taken back
            return
        import wandb  # type: ignore[import-not-found]

        path = self._folder / "wandb_id"
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=self._project, name=self._folder.name, id=path.read_text().strip(), resume="allow",
            dir=str(self._folder), config=self._about,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def write(self, entry: dict[str, Any]) -> None:
        assert self._run is not None
        samples = {f"sample/{i}": text for i, text in enumerate(entry.get("samples", ()))}
        self._run.log({"step": entry["step"], **figures(entry), **samples})

    def event(self, step: int, text: str) -> None:
        assert self._run is not None
        self._run.log({"step": step, "event": text})

    def end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
