"""Batches of examples that are in memory, for fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from .loader import ENDLESS, Batch, Epochs, Loader, check_rows, check_seed


def open_examples(
    examples: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    rows: range | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    collate: Callable[[list[dict]], Batch],
    workers: int = 2,
) -> Loader:
    """Batches of examples, in an order that seed and epoch give, or in the order given.

    Args:
      examples: N of them; anything with a length that can be indexed.
      batch_size: B, over all processes.
      rows: of each batch, those that this process reads (default: all).
      repeat: epoch after epoch without end, one going over into the next within a batch; else once, and the last batch
        is filled with copies of its last example: results, joined in order, are cut to N.
      collate: makes a batch of batch_size examples, of which this process takes its rows: every process has to make
        the same shapes, which follow from the lengths of all.
      workers: threads that read ahead and collate.

    Raises:
      ValueError: no examples; rows that a batch does not have.
    """
    if not len(examples):
        raise ValueError("expected at least one example, got none")
    stream = Examples(examples, check_seed(seed) % 2**32 if shuffle else None, repeat, batch_size)
    check_rows(rows, batch_size)
    about = {"examples": len(examples)}
    return Loader(stream, batch_size=batch_size, rows=rows, collate=collate, workers=workers, about=about, whole=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples as a `Stream`."""

    examples: Sequence[dict]
    seed: int | None
    repeat: bool
    batch_size: int

    @cached_property
    def _epochs(self) -> Epochs:
        return Epochs(self.examples, self.seed, endless=self.repeat)

    def __len__(self) -> int:
        return ENDLESS if self.repeat else -(-len(self.examples) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> dict:
        return self._epochs[index if self.repeat else min(index, len(self.examples) - 1)]

    def state(self, drawn: int) -> dict[str, Any]:
        return {"drawn": drawn, "seed": self.seed, "examples": len(self.examples)}

    def at(self, state: dict[str, Any]) -> tuple[Examples, int]:
        expected = self.state(0)
        wrong = [name for name in expected if name not in state or name != "drawn" and state[name] != expected[name]]
        if wrong:
            said = ", ".join(f"{name} {state.get(name)!r}, here {expected[name]!r}" for name in wrong)
            raise ValueError(f"the saved place is in other examples: {said}")
        return self, int(state["drawn"])
