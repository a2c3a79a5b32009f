"""Documents to ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from .documents import Part, whole_document

BATCH = 1 << 20
"""Characters tokenized in one call; longer documents are cut where that changes no id."""
MOST = 4096
"""Parts tokenized in one call."""
LINE_END = re.compile(r"[!-~]\n", re.ASCII)


def encode_documents(texts: Iterable[str], tokenizer: Any, eos_token_id: int) -> tuple[np.ndarray, int]:
    """Strips every text, appends </s>, joins all.

    Args:
      texts: the documents; those that are empty once stripped are left out.
      tokenizer: a `tokenizers.Tokenizer`; its own template is not applied.
      eos_token_id: the id of </s>.

    Returns:
      ids `[N]` int32, and the number of UTF-8 bytes they stand for.
    """
    size, found = 0, [np.zeros(0, np.int32)]
    for ids, batch in encode(map(whole_document, texts), tokenizer, eos_token_id):
        found.append(ids)
        size += sum(part.size for part in batch)
    return np.concatenate(found), size


def encode(
    parts: Iterable[Part], tokenizer: Any, eos_token_id: int, splits: bool = False
) -> Iterator[tuple[np.ndarray, list[Part]]]:
    """The ids, int32, of about `BATCH` characters at a time, and the parts they were made of.

    Args:
      splits: long texts may be cut at their lines; see `splits_at_lines`.
    """
    for batch in _batches(_cut(parts) if splits else parts):
        texts = [part.text for part in batch]
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for row, part in zip(rows, batch, strict=True):
            if part.ends:
                row.append(eos_token_id)
        yield np.fromiter(chain.from_iterable(rows), np.int32, sum(map(len, rows))), batch


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    held: list[Part] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part.text)
        if size >= BATCH or len(held) == MOST:
            yield held
            held, size = [], 0
    if held:
        yield held


def _cut(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        start = 0
        while match := LINE_END.search(part.text, start + BATCH):
            yield Part(part.text[start : match.start() + 1], size=0, ends=False, empty=False, read=0)
            start = match.start() + 1
        yield part._replace(text=part.text[start:])  # what is counted of the part is counted once, here


def splits_at_lines(state: dict[str, Any]) -> bool:
    """Whether a text may be tokenized in parts, cut before an end of line that follows a printed ASCII character.

    In GPT-2's rules for words, which OPT has, no word holds both; with other rules, or with special tokens that swallow
    the space beside them, a text is tokenized whole.

    Args:
      state: the tokenizer's JSON.
    """
    words = state["pre_tokenizer"] or {}
    rules = words.get("type"), words.get("use_regex", True), words.get("add_prefix_space")
    return (
        state["normalizer"] is None
        and rules == ("ByteLevel", True, False)
        and not any(token["lstrip"] or token["rstrip"] or "\n" in token["content"] for token in state["added_tokens"])
    )
