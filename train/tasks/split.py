"""What is held out of the data, to choose the best checkpoint by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def hold_out(
    items: Sequence[T], fraction: float, seed: int, group: Callable[[T], Hashable] | None = None
) -> tuple[list[T], list[T]]:
    """Items to train on, and about that fraction of them held out, each in their order.

    Args:
      group: items of one group stay together; by default each is its own.

    Raises:
      ValueError: one of the two is empty.
    """
    if fraction == 0:
        return list(items), []
    keys = [i if group is None else group(item) for i, item in enumerate(items)]
    names = list(dict.fromkeys(keys))
    count = max(1, round(fraction * len(names)))
    if count >= len(names):
        raise ValueError(
            f"{len(names)} rows or groups are too few to hold some out of them; give --validation FILE or "
            "--validation-fraction 0"
        )
    drawn = np.random.default_rng(seed).permutation(len(names))[:count]
    held = {names[i] for i in drawn}
    kept = [item for item, key in zip(items, keys, strict=True) if key not in held]
    return kept, [item for item, key in zip(items, keys, strict=True) if key in held]
