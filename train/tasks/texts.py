"""Texts, or pairs of texts, as a classifier reads them: the tokenizer's own form of each, read at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optjax.tokenizer import Tokenizer

from .lengths import padded
from .table import Row


def encode_texts(
    rows: Sequence[Row], columns: Sequence[str], tokenizer: Tokenizer, longest: int, too_long: str = "error"
) -> list[list[int] | None]:
    """The ids of each row's text, or of its two texts one after another; None for a row that is to be dropped.

    Args:
      columns: one or two.
      too_long: of a row of more than ``longest`` tokens. ``"cut"`` takes the end off the longer text, ``"drop"`` gives
        None.

    Raises:
      ValueError: not one or two columns, a row without text or with none at all, or too long.
    """
    if len(columns) not in (1, 2):
        raise ValueError(f"one or two columns of text, not {len(columns)}: {', '.join(columns)}")
    backend = tokenizer.backend
    each = [backend.encode_batch([row.text(name) for row in rows], add_special_tokens=False) for name in columns]
    room = longest - backend.num_special_tokens_to_add(len(columns) == 2)
    made: list[list[int] | None] = []
    for row, *parts in zip(rows, *each, strict=True):
        total = sum(len(part) for part in parts)
        if total == 0:
            raise ValueError(f"{row.where}: {' and '.join(map(repr, columns))} hold no text")
        if total > room and too_long == "error":
            raise ValueError(
                f"{row.where} has {total + longest - room} tokens, the limit is {longest}: give --too-long cut or "
                "drop, or a larger --max-length if the model has the positions"
            )
        if total > room and too_long == "drop":
            made.append(None)
            continue
        for part, size in zip(parts, _shares([len(part) for part in parts], room), strict=True):
            if size < len(part):
                part.truncate(size)
        made.append(backend.post_process(*parts).ids)
    return made


def _shares(sizes: Sequence[int], room: int) -> list[int]:
    """Of so much room: the longest are shortened first, until all fits."""
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    first, second = sizes
    half = room // 2
    if first + second <= room:
        return [first, second]
    if first <= half:
        return [first, room - first]
    if second <= room - half:
        return [room - second, second]
    return [half, room - half]


def collate(examples: Sequence[dict[str, Any]], pad_id: int, longest: int) -> dict[str, np.ndarray]:
    """A batch of examples ``{"input_ids": [T], …}``: padded on the right, with its mask; other fields are stacked."""
    ids = [example["input_ids"] for example in examples]
    batch = {
        "input_ids": padded(ids, pad_id, longest),
        "attention_mask": padded([np.ones(len(row), np.int32) for row in ids], 0, longest),
    }
    return batch | {name: np.stack([e[name] for e in examples]) for name in examples[0] if name != "input_ids"}
