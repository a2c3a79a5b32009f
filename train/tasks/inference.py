"""A function of the params over many examples: in batches of few shapes, the results in the examples' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optjax.params import Params

from ..data import open_examples
from ..placing import place_batch, rows
from .watch import Watch, nobody

Example = dict[str, Any]
Collate = Callable[[list[Example]], dict[str, np.ndarray]]


def over_examples(
    function: Callable[[Params, dict[str, jax.Array]], tuple[jax.Array, ...]],
    params: Params,
    examples: Sequence[Example],
    collate: Collate,
    batch_size: int,
    watch: Watch = nobody,
) -> list[tuple[np.ndarray, ...]]:
    """For each example its part of what the function gives, whose arrays have a leading axis B.

    Examples of similar length share a batch. Every process gets all results.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    loader = open_examples(
        [examples[i] for i in order],
        batch_size=batch_size,
        seed=0,
        rows=rows(params, batch_size),
        shuffle=False,
        repeat=False,
        collate=collate,
    )
    found: list[tuple[np.ndarray, ...]] = []
    with loader:
        for batch in loader:
            arrays = [_fetch(array) for array in function(params, place_batch(batch, params, batch_size))]
            found += zip(*arrays, strict=True)
            watch(min(len(found), len(examples)))  # the last batch is filled with copies
    in_order: list[Any] = [None] * len(examples)
    for i, result in zip(order, found, strict=False):
        in_order[i] = result
    return in_order


def _fetch(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
