"""A run's log: one JSON object a line in `log.jsonl`, and a progress bar (plain lines where there is no terminal)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax


class Log:
    """The log of one run, from step `first` to step `last`. Use as a context manager.

    A run that resumes from a checkpoint does some steps again; what the log says of steps after `first` is dropped.
    Of several processes only the first writes.
    """

    def __init__(self, folder: str | Path, first: int, last: int, quiet: bool = False):
        self.path = Path(folder) / "log.jsonl"
        self._progress, self._quiet = None, quiet or jax.process_index() > 0
        if jax.process_index() > 0:
            self._file = open(os.devnull, "w", encoding="utf-8")
            return
        kept = [entry for entry in read_log(folder) if entry["step"] <= first]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = open(self.path, "a", encoding="utf-8")
        if not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._console = Console(stderr=True)
            if self._console.is_terminal:
                columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
                more = (TextColumn("{task.fields[line]}"), TimeElapsedColumn(), "left", TimeRemainingColumn())
                self._progress = Progress(*columns, *more, console=self._console)
                self._task = self._progress.add_task("step", total=last, completed=first, line="compiling")

    def __enter__(self) -> Log:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry; it is on disk when this returns."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._progress is not None:
            self._progress.update(self._task, completed=entry["step"], line=_line(entry))
        self.say(f"step {entry['step']}: {_line(entry)}", to_terminal="validation_loss" in entry)

    def say(self, text: str, to_terminal: bool = True) -> None:
        """A line for the reader; with a progress bar on the terminal only what is `to_terminal`."""
        if not self._quiet and (self._progress is None or to_terminal):
            self._console.print(text, highlight=False, soft_wrap=True)


def _line(entry: dict[str, Any]) -> str:
    line = f"loss {entry['loss']:.4f}, {entry['tokens_per_second']:,.0f} tokens/s"
    if "validation_loss" in entry:
        line += f", validation {entry['validation_loss']:.4f} ({entry['validation_bits_per_byte']:.4f} bits/byte)"
    return line


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's log; none where it has no log."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed
            break
    return entries
