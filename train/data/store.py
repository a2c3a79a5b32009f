"""Packed text on disk: a folder of ArrayRecord shards, and `about.json`, which says what they hold.

The text is one long row of token ids, every document followed by </s> (Zhang et al. 2022, section 2.3). It is cut into
shards where the packer's pieces of work ended, and each shard into records of `block_length` ids, the last one shorter:
little-endian uint16 where the vocabulary fits, else uint32. Blocks know nothing of training records: a window of any
length is put together from one or two of them when it is read, so that one packed folder serves every length.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ABOUT = "about.json"
FORMAT = 1
BLOCK_LENGTH = 8192
"""Ids per record: 16 KiB, of which zstd saves a quarter or more. Smaller ones take longer to read in all, larger ones
are mostly read in vain."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is known of one shard.

    Attributes:
      file: its name in the folder.
      tokens: ids, those of </s> included.
      bytes: UTF-8 bytes of text that they stand for.
      documents: how many </s> were put; `empty` documents were left out.
      size, crc32: of the file.
    """

    file: str
    tokens: int
    bytes: int
    documents: int
    empty: int
    size: int
    crc32: int


def token_dtype(vocab_size: int) -> np.dtype:
    """How ids of a vocabulary are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_records(path: Path, ids: Iterable[np.ndarray], block_length: int, dtype: np.dtype) -> int:
    """Writes ids, given in pieces of any size, as one shard; returns their number. It is on disk when this returns."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
    count, held = 0, np.zeros(0, dtype)
    for piece in ids:
        count += len(piece)
        held = np.concatenate([held, piece.astype(dtype)])
        full = len(held) // block_length * block_length
        for at in range(0, full, block_length):
            writer.write(held[at : at + block_length].tobytes())
        held = held[full:]
    if len(held):
        writer.write(held.tobytes())
    writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return count


def checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either whole or not there, whatever happens meanwhile."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_about(folder: Path, shards: list[Shard], **rest: Any) -> None:
    """Writes `about.json`, by which the folder counts as finished."""
    total = {name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "bytes", "documents", "empty")}
    about = {"format": FORMAT, **rest, **total, "shards": [dataclasses.asdict(shard) for shard in shards]}
    write_json(folder / ABOUT, about)


def write_tokens(
    folder: str | Path,
    tokens: np.ndarray,
    *,
    vocab_size: int,
    eos_token_id: int = 2,
    bytes: int = 0,
    block_length: int = BLOCK_LENGTH,
) -> None:
    """Writes ids `[N]` that were made elsewhere as a packed folder of one shard.

    Args:
      vocab_size: entries of the tokenizer that made them.
      bytes: of the text they stand for, in UTF-8, where that is known.

    Raises:
      ValueError: ids that are not in the vocabulary, or not of one row.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"expected one row of integer ids, got {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"ids should be from 0 to {vocab_size - 1}, not {tokens.min()} to {tokens.max()}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = shard_name(0)
    count = write_records(folder / name, [tokens], block_length, token_dtype(vocab_size))
    ends = int((tokens == eos_token_id).sum())
    shard = Shard(name, count, bytes, ends, 0, *checksum(folder / name))
    write_about(folder, [shard], vocab_size=vocab_size, eos_token_id=eos_token_id, block_length=block_length)


def shard_name(number: int) -> str:
    return f"text-{number:05d}.array_record"


class PackedText:
    """The ids of a packed folder, as windows of `length + 1`: one is T inputs and, shifted by one, their T labels.

    The next window begins with the last label of this one, so that every token but the first is predicted exactly once;
    fewer than T at the end are left out. A sequence, as grain wants its sources: `text[i]` is `[T + 1]`, int32. Threads
    may read side by side.

    Attributes:
      about: what `about.json` says.
      tokens: ids in all.
      bytes_per_token: UTF-8 bytes of the text per id, </s> included; turns nats per token into bits per byte.
      identity: a few letters that say which text this is, wherever the folder lies.
    """

    def __init__(self, folder: str | Path, length: int, vocab_size: int | None = None, *, short: bool = False):
        """Opens what `python -m optjax.train.pack` wrote; reads no tokens yet. `short`: less than a window will do.

        Raises:
          FileNotFoundError: the folder, its `about.json` or a shard is not there.
          ValueError: packing was not finished, a shard is damaged, the text is shorter than one window, or was packed
            with a larger vocabulary than `vocab_size`.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder, self.length = Path(folder), length
        if length < 1:
            raise ValueError(f"length is {length}; expected at least 1 token per record")
        self.about = read_about(self.folder)
        shards = [Shard(**each) for each in self.about["shards"]]
        for shard in shards:
            _check_size(self.folder, shard)
        self.shards = shards = [shard for shard in shards if shard.tokens]
        self.tokens: int = self.about["tokens"]
        if self.tokens < (2 if short else length + 1):
            raise ValueError(f"{folder} holds {self.tokens} tokens; one record of length {length} needs {length + 1}")
        if vocab_size is not None and self.about["vocab_size"] > vocab_size:
            raise ValueError(
                f"{folder} was packed by a tokenizer of {self.about['vocab_size']} entries, the model has {vocab_size}"
            )
        self.eos_token_id: int = self.about["eos_token_id"]
        self.bytes_per_token = self.about["bytes"] / self.tokens
        contents = [[shard.tokens, shard.crc32] for shard in shards]
        self.identity = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
        self._block: int = self.about["block_length"]
        self._dtype = token_dtype(self.about["vocab_size"])
        blocks = [-(-shard.tokens // self._block) for shard in shards]
        self._first_token = [0, *itertools.accumulate(shard.tokens for shard in shards)]
        self._first_block = [0, *itertools.accumulate(blocks)]
        # Told how many records there are, the library opens a shard when it is first read.
        paths = [f"{self.folder / s.file}[0:{count}]" for s, count in zip(shards, blocks, strict=True)]
        self._records = ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return (self.tokens - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.read(index * self.length, (index + 1) * self.length + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to `stop` of the whole text, int32, across blocks and shards.

        Raises:
          ValueError: a shard is damaged there.
        """
        out = np.empty(stop - start, np.int32)
        at = start
        while at < stop:
            shard = bisect.bisect_right(self._first_token, at) - 1
            block, skip = divmod(at - self._first_token[shard], self._block)
            ids = self._read_block(shard, block)[skip : skip + stop - at]
            out[at - start : at - start + len(ids)] = ids
            at += len(ids)
        return out

    def _read_block(self, shard: int, block: int) -> np.ndarray:
        about = self.shards[shard]
        expected = min(self._block, about.tokens - block * self._block)
        try:
            record = self._records[self._first_block[shard] + block]
        except Exception as error:  # the library has no error class of its own
            raise ValueError(_damaged(self.folder / about.file, f"record {block}: {error}")) from error
        if len(record) != expected * self._dtype.itemsize:
            raise ValueError(_damaged(self.folder / about.file, f"record {block} has {len(record)} bytes"))
        return np.frombuffer(record, self._dtype)


def read_about(folder: Path) -> dict[str, Any]:
    """What `about.json` says.

    Raises:
      FileNotFoundError: it is not there. ValueError: it is not of this format.
    """
    path = folder / ABOUT
    if not path.is_file():
        what = "is not there" if not folder.exists() else f"has no {ABOUT}: nothing was packed there, or not to the end"
        raise FileNotFoundError(f"{folder} {what}; python -m optjax.train.pack writes it")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        known = about["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); pack the text again") from None
    if not known:
        raise ValueError(f"{path} is of format {about['format']}, this version reads {FORMAT}; pack the text again")
    return about


def check_tokenizers(abouts: Mapping[Path, dict[str, Any]]) -> None:
    """Whether folders were packed with one tokenizer, as far as what their `about.json` says tells: one of one name is
    the same, though another version of the library may write it in another way.

    Raises:
      ValueError: they were not.
    """
    names = {about.get("tokenizer") or folder for folder, about in abouts.items()}
    for name in ("vocab_size", "eos_token_id", *(("tokenizer_sha256",) if len(names) > 1 else ())):
        known = [(about[name], folder) for folder, about in abouts.items() if about.get(name) is not None]
        for value, folder in known[1:]:
            if value != known[0][0]:
                raise ValueError(
                    f"{known[0][1]} and {folder} were packed with different tokenizers: {name} is {known[0][0]} and "
                    f"{value}; pack one of them again"
                )


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, though {ABOUT} names it; pack the text again")
    if (size := path.stat().st_size) != shard.size:
        raise ValueError(_damaged(path, f"it has {size} bytes, {ABOUT} says {shard.size}"))


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}); remove it and pack the text again"
