"""Batches of packed text: mixtures without end to train on, and one pass in order to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .loader import ENDLESS, Batch, Epochs, Loader, check_rows, check_seed, mixed_seed
from .store import PackedText, check_tokenizers

IGNORE_INDEX = -100
PAD = 1

Sources = str | Path | Sequence[tuple[str | Path, float]]


class TextLoader(Loader):
    """A `Loader` of packed text.

    Attributes:
      length: T.
      tokens: ids of all sources together.
      bytes_per_token: of the mixture; turns nats per token into bits per byte.
    """

    length: int
    tokens: int
    bytes_per_token: float


def open_text(
    sources: Sources,
    *,
    length: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    rows: range | None = None,
    boundaries: bool = False,
    workers: int = 4,
) -> TextLoader:
    """Batches to train on: `input_ids` and `labels`, `[B, T]` int32, without end.

    Every source is read in windows of T + 1 in an order that seed and epoch give, each window once per epoch; an epoch
    goes over into the next within a batch. The sources take turns, so that at any time each has given its share.

    Args:
      sources: a folder that `python -m optjax.train.pack` wrote, or several, each with its weight: how often its
        windows are drawn, in proportion to the other weights.
      length: T.
      batch_size: B, over all processes.
      rows: of each batch, those that this process reads (default: all).
      boundaries: adds `segment_ids`, see `segments`.
      workers: threads that read ahead.

    Raises:
      FileNotFoundError, ValueError: as `PackedText`; a weight that is not above 0; a source named twice; sources of
        different tokenizers; fewer windows than a batch needs.
    """
    named = with_weights(sources)
    if not named:
        raise ValueError("expected at least one folder of packed text, got none")
    for path, weight in named:
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {path} is {weight}; expected a number above 0")
    texts = tuple(PackedText(path, length, vocab_size) for path, _ in named)
    if len({text.identity for text in texts}) < len(texts):
        raise ValueError(f"one text is named twice among {[str(path) for path, _ in named]}; give it once")
    check_tokenizers({text.folder: text.about for text in texts})
    records = sum(map(len, texts))
    if records < batch_size:
        raise ValueError(f"a batch of {batch_size} records from a text of {records}; ask for a smaller batch")
    shares = _whole_numbers([weight for _, weight in named])
    stream = Mixture(texts, shares, check_seed(seed), (0,) * len(texts))
    eos = texts[0].eos_token_id

    def collate(found: list[np.ndarray]) -> Batch:
        windows = np.stack(found)
        batch = {"input_ids": windows[:, :-1].copy(), "labels": windows[:, 1:].copy()}
        return batch | ({"segment_ids": segments(batch["input_ids"], eos)} if boundaries else {})

    about = {
        "sources": [
            {"text": text.identity, "tokens": text.tokens, "weight": weight}
            for text, (_, weight) in zip(texts, named, strict=True)
        ]
    }
    loader = TextLoader(stream, batch_size=batch_size, rows=rows, collate=collate, workers=workers, about=about)
    loader.length, loader.tokens = length, sum(text.tokens for text in texts)
    given = sum(share * text.bytes_per_token for share, text in zip(shares, texts, strict=True))
    loader.bytes_per_token = given / sum(shares)
    return loader


def with_weights(sources: Sources) -> list[tuple[str | Path, float]]:
    """Each source with its weight, where one alone may stand without."""
    return [(sources, 1.0)] if isinstance(sources, str | Path) else list(sources)


def segments(input_ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """The documents of each row, `[B, T]` int32: 1, 2, …; </s> is the first token of the document that follows it.

    So a document is read as it is when it stands alone after the </s> that every prompt begins with, and nothing in
    it, its first token included, is predicted from the one before; the end of the one before is still a label.
    """
    ends = input_ids == eos_token_id
    return (1 + np.cumsum(ends, axis=1) - ends[:, :1]).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Windows of several texts in turn, without end; see `Stream`.

    Attributes:
      shares: windows of each text among `sum(shares)` drawn.
      starts: windows of each text that were drawn before the first of this stream.
    """

    texts: tuple[PackedText, ...]
    shares: tuple[int, ...]
    seed: int
    starts: tuple[int, ...]

    @cached_property
    def _windows(self) -> list[Epochs]:
        return [Epochs(text, mixed_seed(self.seed, int(text.identity, 16))) for text in self.texts]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        before, after = counts(index, self.shares), counts(index + 1, self.shares)
        which = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        return self._windows[which][self.starts[which] + before[which]]

    def state(self, drawn: int) -> dict[str, Any]:
        names = [text.identity for text in self.texts]
        sources = [list(each) for each in zip(names, self.shares, self.starts, strict=True)]
        return {"drawn": drawn, "length": self.texts[0].length, "seed": self.seed, "sources": sources}

    def at(self, state: dict[str, Any]) -> tuple[Mixture, int]:
        """The same texts, shares and length go on exactly. Where any of them changed each text goes on after as many
        tokens as it has given, in the order of its new windows; one that was not there before begins."""
        try:
            drawn, length, seed = int(state["drawn"]), int(state["length"]), state["seed"]
            before = [(str(name), int(share), int(start)) for name, share, start in state["sources"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a loader of packed text ({error!r}): {state}") from None
        if seed != self.seed:
            raise ValueError(f"the saved place is in the order of seed {seed}, this loader's seed is {self.seed}")
        names = [text.identity for text in self.texts]
        same = [(name, share) for name, share, _ in before] == list(zip(names, self.shares, strict=True))
        if same and length == self.texts[0].length:
            return dataclasses.replace(self, starts=tuple(start for _, _, start in before)), drawn
        given = counts(drawn, [share for _, share, _ in before])
        tokens = {name: (start + count) * length for (name, _, start), count in zip(before, given, strict=True)}
        starts = tuple(-(-tokens.get(text.identity, 0) // text.length) for text in self.texts)
        return dataclasses.replace(self, starts=starts), 0


def counts(drawn: int, shares: Sequence[int]) -> list[int]:
    """How many of the first `drawn` windows come from each text: evenly spread, and no count ever falls.

    The first text takes its share of all, rounded up, the second its share of what is left, and so on.
    """
    found, left, total = [], drawn, sum(shares)
    for share in shares:
        others = left * (total - share) // total
        found.append(left - others)
        left, total = others, total - share
    return found


def _whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers in the same proportions, to a millionth of their sum."""
    total = sum(map(Fraction, weights))
    return tuple(max(1, round(Fraction(weight) / total * 1_000_000)) for weight in weights)


@dataclasses.dataclass(frozen=True, eq=False)
class TextBatches:
    """The batches of `text_batches`; may be iterated any number of times.

    Attributes:
      tokens: labels that count, over all batches and processes.
      bytes_per_token: turns nats per token into bits per byte.
    """

    text: PackedText
    batch_size: int
    rows: range
    count: int
    boundaries: bool
    workers: int

    @property
    def bytes_per_token(self) -> float:
        return self.text.bytes_per_token

    @property
    def tokens(self) -> int:
        return min(self.text.tokens - 1, self.count * self.batch_size * self.text.length)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        import grain

        how = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=2 * self.workers)
        batches: Any = iter(grain.MapDataset.range(self.count).map(self.batch).to_iter_dataset(how))
        try:
            yield from batches
        finally:
            batches.close()

    def batch(self, number: int) -> Batch:
        """This process's rows of one batch."""
        length, last = self.text.length, self.text.tokens - 1
        shape = len(self.rows), length
        ids, labels = np.full(shape, PAD, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
        documents = np.zeros(shape, np.int32)
        for i, row in enumerate(self.rows):
            start = (number * self.batch_size + row) * length
            if (size := min(length, last - start)) > 0:
                window = self.text.read(start, start + size + 1)
                ids[i, :size], labels[i, :size] = window[:-1], window[1:]
                documents[i, :size] = segments(window[None, :-1], self.text.eos_token_id)[0]
        return {"input_ids": ids, "labels": labels} | ({"segment_ids": documents} if self.boundaries else {})


def text_batches(
    path: str | Path,
    length: int,
    batch_size: int,
    max_batches: int | None = None,
    *,
    vocab_size: int | None = None,
    rows: range | None = None,
    boundaries: bool = False,
    workers: int = 2,
) -> TextBatches:
    """Batches to validate on: a text from its beginning, in order, once, each as `open_text` makes them.

    Every token but the first is a label once. The last row and the last batch are filled with labels of -100, ids of
    <pad> and segments 0, so that all batches have one shape: a mean over batches should weigh each by its labels.

    Args:
      path: a folder that `python -m optjax.train.pack` wrote; it may be shorter than one window.
      max_batches: at most so many, from the beginning.

    Raises:
      FileNotFoundError, ValueError: as `PackedText`; a text of one token or none.
    """
    rows = check_rows(rows, batch_size)
    text = PackedText(path, length, vocab_size, short=True)
    windows = -(-(text.tokens - 1) // length)
    count = -(-windows // batch_size)
    if max_batches is not None:
        if max_batches < 1:
            raise ValueError(f"max_batches is {max_batches}; expected at least 1, or None")
        count = min(count, max_batches)
    return TextBatches(text, batch_size, rows, count, boundaries, workers)
