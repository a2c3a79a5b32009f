"""``--calibration``: texts as the windows of ids that `optjax.gptq` goes by."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from optjax.tokenizer import Tokenizer

WINDOWS = 128  # the paper's, and its 2048 tokens
LENGTH = 2048


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The texts of files.

    Raises:
      OSError, ValueError: one cannot be read, or is not UTF-8.
    """
    texts = []
    for path in paths:
        try:
            texts.append(path.expanduser().read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    return texts


def windows(tokenizer: Tokenizer, texts: Iterable[str], positions: int, count: int) -> np.ndarray:
    """Ids ``[N, T]``: windows taken evenly from all texts, each behind a BOS as a text of its own would be.

    Args:
      positions: of the model, at least 2; if fewer than 2048 the length of a window.
      count: how many windows, or all if there are not as many. A single one may be shorter.

    Raises:
      ValueError: no text at all, or a model that has no place for one behind the BOS.
    """
    if positions < 2:
        raise ValueError("a model of a single position reads no text that could be gone by")
    ids = [id for text in texts for id in tokenizer.encode(text, add_special_tokens=False)]
    if not ids:
        raise ValueError("the texts to go by are empty")
    length = min(positions, LENGTH, len(ids) + 1) - 1
    whole = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    chosen = whole[np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)]
    return np.concatenate([np.full((len(chosen), 1), tokenizer.bos_token_id, np.int32), chosen], axis=1)
