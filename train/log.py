"""A run's log: one JSON object a line in `log.jsonl`, and a progress bar (plain lines where there is no terminal).

An entry of steps has `step`, the last of them, and figures; an entry with `event` tells what happened: `rollback`,
`gave up`, `damaged` or `save failed`, and its `text` is for a reader. Of several processes only the first writes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .tracking import Tracker

FILE = "log.jsonl"


class Log:
    """The log of one run, from step `first` to step `last`. Use as a context manager.

    A run that resumes from a checkpoint does some steps again: what the log says of them, from the byte `position` that
    the checkpoint remembers on, is dropped; without a position, what it says of steps after `first`.
    """

    def __init__(
        self,
        folder: str | Path,
        first: int,
        last: int,
        quiet: bool = False,
        position: int | None = None,
        trackers: Sequence[Tracker] = (),
    ):
        self.path = Path(folder) / FILE
        self._progress, self._quiet, self._trackers = None, quiet or jax.process_index() > 0, []
        self._waiting, self._full = b"", False
        if jax.process_index() > 0:
            self._file = open(os.devnull, "ab", buffering=0)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if position is None or not self.path.is_file() or self.path.stat().st_size < position:
            kept = [entry for entry in _entries(folder) if entry["step"] <= first]
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        else:
            os.truncate(self.path, position)
        self._file = open(self.path, "ab", buffering=0)
        if not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._console = Console(stderr=True)
            if sys.stderr.isatty():  # rich would take a notebook for a terminal
                columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
                more = (TextColumn("{task.fields[line]}"), TimeElapsedColumn(), "left", TimeRemainingColumn())
                self._progress = Progress(*columns, *more, console=self._console)
                self._task = self._progress.add_task("step", total=last, completed=first, line="compiling")
        self._trackers = list(trackers)
        self._track("begin", first)

    def __enter__(self) -> Log:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._track("end")
        self._file.close()

    @property
    def position(self) -> int:
        """Where the next entry begins, in bytes."""
        return self._file.tell() + len(self._waiting) if jax.process_index() == 0 else 0

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry of steps; it is in the file when this returns."""
        self._append(entry)
        self._track("write", entry)
        if self._progress is not None:
            self._progress.update(self._task, completed=entry["step"], line=_line(entry))
        validated = any(name.startswith("validation_") for name in entry)
        self.say(f"step {entry['step']}: {_line(entry)}", to_terminal=validated)
        for text in entry.get("samples", [])[:1]:
            self.say(f"  {text!r}")

    def event(self, step: int, event: str, text: str, **more: Any) -> None:
        """Adds something that happened, and says so."""
        self._append({"step": step, "event": event, "text": text, **more})
        self._track("event", step, text)
        if "back_to" in more:
            self._track("begin", more["back_to"])
        self.say(text)

    def at(self, step: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str, to_terminal: bool = True) -> None:
        """A line for the reader; with a progress bar on the terminal only what is `to_terminal`."""
        if not self._quiet and (self._progress is None or to_terminal):
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _append(self, entry: dict[str, Any]) -> None:
        """What a full disk does not take waits for the next entry."""
        self._waiting += (json.dumps(entry) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._full = False
        except OSError as error:
            if not self._full:
                self.say(f"{self.path} cannot be written ({error}); its entries wait")
            self._full = True

    def _track(self, what: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*arguments)
            except OSError as error:
                self._trackers.remove(tracker)
                self.say(f"no more entries for {type(tracker).__name__}: {error}")


def _line(entry: dict[str, Any]) -> str:
    parts = [f"loss {entry['loss']:.4f}"]
    if "tokens_per_second" in entry:
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in entry:
        parts.append(f"MFU {entry['mfu']:.0%}")
    line = ", ".join(parts)
    found = {name.removeprefix("validation_"): v for name, v in entry.items() if name.startswith("validation_")}
    if found:
        line += ", validation " + ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    return line


def read_log(folder: str | Path, everything: bool = False) -> list[dict[str, Any]]:
    """The entries of a run's steps; none where it has no log.

    Args:
      everything: with those of steps that were rolled back, which else are left out.
    """
    kept: list[dict[str, Any]] = []
    for entry in _entries(folder):
        if "event" not in entry:
            kept.append(entry)
        elif "back_to" in entry and not everything:
            kept = [before for before in kept if before["step"] <= entry["back_to"]]
    return kept


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """What happened to a run, in order: entries with `step`, `event` and `text`."""
    return [entry for entry in _entries(folder) if "event" in entry]


def _entries(folder: str | Path) -> list[dict[str, Any]]:
    path = Path(folder) / FILE
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed
            break
    return entries
