"""Texts that are longer than the model, or than one wants: what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optjax.config import OPTConfig
from optjax.generation.buckets import bucket

TOO_LONG = ("error", "cut", "drop")


def max_length(config: OPTConfig, asked: int | None) -> int:
    """The tokens that a row may have.

    Raises:
      ValueError: more are asked for than the model has positions.
    """
    longest = config.max_position_embeddings
    if asked is not None and not 2 <= asked <= longest:
        raise ValueError(f"--max-length {asked} should be at least 2 and at most max_position_embeddings {longest}")
    return asked or longest


def padded(rows: Sequence[Sequence[int] | np.ndarray], value: int, longest: int) -> np.ndarray:
    """Rows of ids as ``[B, T]`` int32, filled on the right with ``value``.

    T is the size that `bucket` gives to the longest row and at most ``longest``, so that few shapes are compiled.
    """
    width = min(longest, bucket(max(map(len, rows))))
    made = np.full((len(rows), width), value, np.int32)
    for line, row in zip(made, rows, strict=True):
        line[: len(row)] = row
    return made
