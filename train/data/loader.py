"""Batches for this process, read ahead by threads, in an order that is the same however many processes there are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import numpy as np

Batch = dict[str, np.ndarray]
Collate = Callable[[list[Any]], Batch]

AHEAD = 2
"""Batches read ahead, per thread."""


class Stream(Protocol):
    """Records in the order in which they are drawn, and how to find a place in it again. Not changed by any method."""

    def __len__(self) -> int:
        """How many there are; `sys.maxsize` where there is no end."""
        ...

    def __getitem__(self, index: int) -> Any: ...

    def state(self, drawn: int) -> dict[str, Any]:
        """The place after that many records, for JSON."""
        ...

    def at(self, state: dict[str, Any]) -> tuple[Stream, int]:
        """The stream to go on with from a saved place, and the number of its records that are behind it already."""
        ...


class Loader(Iterator[Batch]):
    """An iterator of batches: dicts of numpy arrays, each with this process's rows of the batch first.

    Batch n holds records n B to (n + 1) B of the stream, of which every process reads its own rows. Its state is the
    place after what was yielded; what has been read ahead does not count.

    Attributes:
      batch_size: B, rows of a batch over all processes.
      rows: those of them that this process reads.
      about: what the data is, for JSON.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        collate: Collate,
        rows: range | None = None,
        workers: int = 4,
        about: dict[str, Any] | None = None,
        whole: bool = False,
    ):
        """Args:
          collate: makes a batch of a list of records: those of this process's rows.
          whole: or of all rows, and only then its own are taken, where the shapes depend on all and reading is cheap.
          workers: threads that read ahead; 0 reads each batch when it is asked for.

        Raises:
          ValueError: no rows, or rows that a batch does not have.
        """
        self.batch_size, self.rows = batch_size, check_rows(rows, batch_size)
        self.about = about or {}
        if workers < 0:
            raise ValueError(f"workers is {workers}; expected 0 or more threads")
        self._collate, self._workers, self._whole = collate, workers, whole
        self._stream, self._drawn = stream, 0
        self._batches: Any = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._read_ahead()
        batch = next(self._batches)
        self._drawn += self.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch yielded, the same on every process. JSON holds it exactly."""
        return self._stream.state(self._drawn)

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a place that `get_state` gave, with any batch size and any rows.

        Raises:
          ValueError: the state is of other data, or of another seed.
        """
        stream, drawn = self._stream.at(state)  # an error leaves this loader as it was
        self.close()
        self._stream, self._drawn = stream, drawn

    def close(self) -> None:
        """Stops reading ahead. `next` starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> Any:
        import grain

        stream, collate, rows, whole = self._stream, self._collate, self.rows, self._whole
        first, size = self._drawn, self.batch_size

        def read(number: int) -> Batch:
            start = first + number * size
            if whole:
                return take_rows(collate([stream[start + row] for row in range(size)]), rows)
            return collate([stream[start + row] for row in rows])

        batches = grain.MapDataset.range((len(stream) - first) // size).map(read)
        how = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=AHEAD * self._workers)
        return iter(batches.to_iter_dataset(how))


def check_rows(rows: range | None, batch_size: int) -> range:
    """Rows of a batch; all of them where none are named.

    Raises:
      ValueError: no batch, no rows, or rows that the batch does not have.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if rows is None:
        return range(batch_size)
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"rows are {rows}; expected some of the {batch_size} rows of a batch")
    return rows


def take_rows(batch: Batch, rows: range) -> Batch:
    """Some rows of a batch."""
    return {name: array[list(rows)] for name, array in batch.items()}


def check_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    return seed


def mixed_seed(*parts: int) -> int:
    """One seed of 32 bits, as grain wants it, of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Records(Protocol):
    """What can be counted and read by index, as grain wants its sources."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Epochs:
    """Records epoch after epoch, each in an order of its own by `seed`; in the given order where that is None.

    No order is held in memory: grain computes where each index leads.
    """

    def __init__(self, records: Records, seed: int | None, endless: bool = True):
        import grain

        dataset: Any = grain.MapDataset.source(records)  # type: ignore[arg-type]
        if seed is not None:
            dataset = dataset.shuffle(seed=seed)
        self._dataset = dataset.repeat() if endless else dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


ENDLESS = sys.maxsize
