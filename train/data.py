"""Packed text: documents, each followed by </s>, in one long row of ids, read as records of T + 1.

A record holds T inputs and, shifted by one, their T labels; the next record begins with the last label of this one, so
that every token of the text is predicted exactly once per epoch. Which records make the batch of a step is a pure
function of seed and step: a run that resumes sees what it would have seen (Zhang et al. 2022, section 2.3, for the
packing).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class PackedText:
    """Ids of a whole corpus, cut into records of ``length + 1``.

    Attributes:
      tokens: `[N]`, unsigned integers; a memory map, so that a corpus larger than memory is no trouble.
      length: T, inputs per record.
      bytes_per_token: UTF-8 bytes of the text per id, </s> included; turns nats per token into bits per byte.
    """

    tokens: np.ndarray
    length: int
    bytes_per_token: float

    @classmethod
    def open(cls, path: str | Path, length: int, vocab_size: int) -> PackedText:
        """Opens what `write_packed` wrote.

        Raises:
          FileNotFoundError: the .npy file or its .json is not there.
          ValueError: the text is shorter than one record, or was packed with a larger vocabulary.
        """
        path = Path(path)
        for needed in (path, path.with_suffix(".json")):
            if not needed.is_file():
                raise FileNotFoundError(f"{needed} is not there; python -m optjax.train.pack writes it")
        about = json.loads(path.with_suffix(".json").read_text())
        tokens = np.load(path, mmap_mode="r")
        if len(tokens) < length + 1:
            raise ValueError(f"{path} holds {len(tokens)} tokens; one record of length {length} needs {length + 1}")
        if about["vocab_size"] > vocab_size:
            raise ValueError(
                f"{path} was packed by a tokenizer of {about['vocab_size']} entries, the model has {vocab_size}"
            )
        return cls(tokens, length, about["bytes"] / len(tokens))

    @property
    def records(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def take(self, indices: Iterable[int]) -> np.ndarray:
        """The records of those indices: `[B, T + 1]`, int32."""
        return np.stack([self.tokens[i * self.length : (i + 1) * self.length + 1] for i in indices]).astype(np.int32)

    def batch(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """The batch of a step: `[B, T + 1]`, int32. Every epoch has its own order; its last partial batch is left out.

        Raises:
          ValueError: there are fewer records than a batch needs.
        """
        per_epoch = self.records // batch_size
        if per_epoch == 0:
            raise ValueError(f"a batch of {batch_size} records from a text of {self.records}; ask for a smaller batch")
        epoch, place = divmod(step, per_epoch)
        return self.take(_order(seed, epoch, self.records)[place * batch_size : (place + 1) * batch_size])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(count)


def pack(texts: Iterable[str], tokenizer: Any, eos_token_id: int) -> tuple[np.ndarray, int]:
    """Strips every text, appends </s>, joins all.

    Args:
      texts: the documents; those that are empty once stripped are left out.
      tokenizer: a `tokenizers.Tokenizer`; its own template is not applied.
      eos_token_id: the id of </s>.

    Returns:
      ids `[N]` (uint16 where the vocabulary fits, else uint32) and the number of UTF-8 bytes they stand for.
    """
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    parts: list[np.ndarray] = []
    size = 0
    for text in texts:
        text = text.strip()
        if text:
            parts.append(np.array(tokenizer.encode(text, add_special_tokens=False).ids + [eos_token_id], dtype))
            size += len(text.encode())
    return (np.concatenate(parts) if parts else np.zeros(0, dtype)), size


def write_packed(path: str | Path, tokens: np.ndarray, size: int, vocab_size: int) -> None:
    """Writes ids as .npy, and what is known of them (bytes of text, vocabulary) as .json beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens)
    path.with_suffix(".json").write_text(json.dumps({"bytes": size, "tokens": len(tokens), "vocab_size": vocab_size}))
