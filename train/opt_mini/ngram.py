"""An n-gram model over bytes, as a yardstick: interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

CHUNK = 8_000_000
"""Bytes counted at a time, which bounds the memory for sorting: a corpus of any size takes under 1 GB."""


@dataclasses.dataclass(frozen=True)
class _Level:
    """The n-grams of one length, and what follows each of their contexts. Keys are the bytes as one integer, sorted."""

    grams: np.ndarray  # uint64 [n]: context and last byte
    counts: np.ndarray  # float64 [n]
    contexts: np.ndarray  # uint64 [m]
    totals: np.ndarray  # float64 [m]: sum of the counts of a context
    held_back: np.ndarray  # float64 [m]: probability mass for the next shorter context, times the total
    discounts: np.ndarray  # float64 [4]: subtracted from counts of 0, 1, 2 and 3 or more


class ByteNgram:
    """p(next byte | the `order` bytes before it).

    Args:
      text: what it learns from.
      order: bytes of context, 1 to 7.

    Raises:
      ValueError: an order it cannot hold, or a text shorter than one n-gram.
    """

    def __init__(self, text: bytes, order: int = 5):
        if not 1 <= order <= 7:
            raise ValueError(f"order should be from 1 to 7 bytes of context, not {order}")
        if len(text) <= order:
            raise ValueError(f"{len(text)} bytes are too few for an order-{order} model")
        self.order = order
        grams, counts = _count(np.frombuffer(text, np.uint8), order + 1)
        levels = [_level(grams, counts)]
        for length in range(order, 0, -1):
            # Kneser-Ney: a shorter n-gram counts once for every different byte it follows, not for every occurrence.
            shorter = np.sort(grams & np.uint64((1 << 8 * length) - 1))
            grams, counts = _merge(shorter, np.ones(len(shorter), np.int64))
            levels.append(_level(grams, counts))
        self._levels = levels[::-1]  # from no context to the longest

    def probabilities(self, contexts: np.ndarray, following: np.ndarray) -> np.ndarray:
        """p of each byte `following` `[N]` after the bytes `contexts` `[N, order]` (uint8): float64 `[N]`."""
        p = np.full(len(following), 1 / 256)
        context = np.zeros(len(following), np.uint64)
        for k, level in enumerate(self._levels):
            if k:  # one more byte to the left
                context |= contexts[:, -k].astype(np.uint64) << np.uint64(8 * (k - 1))
            place, found = _find(level.contexts, context)
            total = np.where(found, level.totals[place], 1.0)
            back = np.where(found, level.held_back[place], 1.0)
            gram, seen = _find(level.grams, context << np.uint64(8) | following.astype(np.uint64))
            count = np.where(seen, level.counts[gram], 0.0)
            left = count - level.discounts[np.minimum(count, 3).astype(int)]
            p = (left + back * p) / total
        return p

    def bits(self, text: bytes) -> float:
        """Bits to code a text, of which the first `order` bytes are coded after as many line ends."""
        padded = np.frombuffer(b"\n" * self.order + text, np.uint8)
        contexts = np.lib.stride_tricks.sliding_window_view(padded, self.order)[: len(text)]
        return float(-np.log2(self.probabilities(contexts, padded[self.order :])).sum())


def _keys(text: np.ndarray, length: int) -> np.ndarray:
    keys = np.zeros(len(text) - length + 1, np.uint64)
    for i in range(length):
        keys = keys << np.uint64(8) | text[i : len(text) - length + 1 + i]
    return keys


def _count(text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    grams, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for start in range(0, len(text) - length + 1, CHUNK):
        found = np.unique_counts(_keys(text[start : start + CHUNK + length - 1], length))
        both = np.concatenate([grams, found.values])
        order = np.argsort(both, kind="stable")
        grams, counts = _merge(both[order], np.concatenate([counts, found.counts])[order])
    return grams, counts


def _merge(ordered: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys of an ordered array, and the sums of their counts."""
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.add.reduceat(counts, starts)


def _level(grams: np.ndarray, counts: np.ndarray) -> _Level:
    discounts = _discounts(counts)
    contexts, totals = _merge(grams >> np.uint64(8), counts)
    _, held_back = _merge(grams >> np.uint64(8), discounts[np.minimum(counts, 3)])
    return _Level(grams, counts.astype(float), contexts, totals.astype(float), held_back, discounts)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts of counts 0, 1, 2, 3+ from how many n-grams occur once, twice, …; plain ones where too few do."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(found, 0.0, [0.0, 1.0, 2.0, 3.0])


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def check_distribution(model: ByteNgram, texts: Iterable[bytes], samples: int = 200, seed: int = 0) -> float:
    """The largest |sum of p over all 256 bytes - 1| over contexts drawn from the texts."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for text in texts:
        data = np.frombuffer(text, np.uint8)
        starts = rng.integers(0, len(data) - model.order + 1, samples)
        contexts = np.stack([data[s : s + model.order] for s in starts]).repeat(256, axis=0)
        p = model.probabilities(contexts, np.tile(np.arange(256, dtype=np.uint8), samples))
        worst = max(worst, float(np.abs(p.reshape(samples, 256).sum(1) - 1).max()))
    return worst
