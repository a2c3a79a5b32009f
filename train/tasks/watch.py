"""A bar for what takes long and says nothing on the way, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

# Is told how many of the examples are done.
Watch = Callable[[int], None]


def nobody(_: int) -> None:
    """Does not look."""


@contextmanager
def bar(what: str, total: int, quiet: bool) -> Iterator[Watch]:
    """A `Watch` that draws, on a terminal and unless ``quiet``."""
    if quiet or not sys.stderr.isatty() or jax.process_index() > 0:
        yield nobody
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(what, total=total)
        yield lambda done: drawn.update(task, completed=done)
