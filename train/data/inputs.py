"""Which files hold the documents, and how they are cut into slices that can be read apart from each other."""

from __future__ import annotations

import dataclasses
import glob
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
SUFFIXES |= {".arrow": "arrow"}
COMPRESSED = {".gz": "gz", ".zst": "zst"}
LARGE = 16 << 20
"""Bytes of a .txt file that are read at a time."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A part of a file: bytes of text or of lines, row groups of parquet, record batches of arrow.

    Attributes:
      start, stop: of those units. A line belongs to the slice it begins in.
      size: bytes, roughly of text; what progress and the size of shards are counted in.
    """

    path: str
    kind: str
    start: int
    stop: int
    size: int


def kind_of(path: Path) -> str | None:
    """txt, jsonl, parquet or arrow; None for other files."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = SUFFIXES.get(suffixes[-2]) if len(suffixes) == 2 else None
        return kind if kind in ("txt", "jsonl") else None
    return SUFFIXES.get(path.suffix)


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of the inputs, in the order given; those of a folder or a pattern in the order of their names.

    Args:
      inputs: files, folders, patterns such as ``"books/*.txt"``, Hugging Face datasets saved with `save_to_disk`.

    Raises:
      FileNotFoundError: something is not there, or a pattern fits nothing.
      ValueError: files of an unknown kind, a folder with several kinds, a file that is named twice.
    """
    found: list[Path] = []
    for each in inputs:
        path = Path(each)
        if path.is_dir():
            found += _of_folder(path)
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(str(each)):
            fitting = [Path(name) for name in sorted(glob.glob(str(each), recursive=True)) if Path(name).is_file()]
            if not fitting:
                raise FileNotFoundError(f"no file fits {each}")
            found += fitting
        else:
            raise FileNotFoundError(f"{each} is not there")
    for path in found:
        if kind_of(path) is None:
            raise ValueError(f"{path}: expected .txt, .jsonl (both also .gz or .zst), .parquet or .arrow")
    repeated = {path for path, count in Counter(found).items() if count > 1}
    if repeated:
        raise ValueError(f"named twice: {', '.join(map(str, sorted(repeated)))}")
    return found


def _of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        names = ", ".join(str(folder / str(split)) for split in splits)
        raise ValueError(f"{folder} is a dataset of several splits; name those meant: {names}")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = _read_json(folder / "state.json")
        if any(value for name, value in state.items() if "indices" in name):
            raise ValueError(f"{folder} selects rows by indices; save it with a current version of datasets")
        return [folder / each["filename"] for each in state["_data_files"]]
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        # A lone .json is somebody's metadata, cache-*.arrow what the library computed once.
        if path.is_file() and not any(part.startswith((".", "cache-")) for part in inner) and path.suffix != ".json":
            if kind := kind_of(path):
                found.setdefault(kind, []).append(path)
    if len(found) != 1:
        what = f"files of several kinds: {', '.join(sorted(found))}" if found else "no .txt, .jsonl, .parquet or .arrow"
        raise ValueError(f"{folder} holds {what}; name those meant, such as '{folder}/*.jsonl'")
    return next(iter(found.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def shard_size(files: Sequence[Path]) -> int:
    """Bytes of text per shard: a sixty-fourth of all, from 4 MiB to 1 GiB, whatever the number of workers."""
    return min(max(sum(path.stat().st_size for path in files) // 64, 4 << 20), 1 << 30)


def plan(files: Sequence[Path], text_field: str, size: int, splits: bool) -> list[list[Slice]]:
    """The slices of each shard, of about `size` bytes; no file is read beyond its metadata.

    Args:
      splits: a long .txt may be cut at its lines (see `encode.splits_at_lines`).

    Raises:
      ValueError: a file without the text field, or damaged.
    """
    shards: list[list[Slice]] = [[]]
    held = 0
    for path in files:
        for part in _slices(path, text_field, size, splits):
            if shards[-1] and held + part.size > size:
                shards.append([])
                held = 0
            shards[-1].append(part)
            held += part.size
    return [shard for shard in shards if shard]


def _slices(path: Path, text_field: str, size: int, splits: bool) -> Iterator[Slice]:
    kind, length = kind_of(path), path.stat().st_size
    assert kind is not None
    if path.suffix in COMPRESSED:
        yield Slice(str(path), kind, 0, length, length)
    elif kind == "txt":
        cuts = [0, *(_line_ends(path, min(size, LARGE)) if splits else []), length]
        yield from (Slice(str(path), kind, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False))
    elif kind == "jsonl":
        cuts = [*range(0, length, size), length]
        yield from (Slice(str(path), kind, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False))
    else:
        from . import tables

        yield from tables.slices(path, kind, text_field, size)


def _line_ends(path: Path, step: int) -> list[int]:
    """Places to cut a text, each right before the end of a line whose last character is no space."""
    length = path.stat().st_size
    found: list[int] = []
    if length <= step:
        return found
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = step
        while match := LINE_END.search(text, at):
            found.append(match.start() + 1)
            at = match.start() + step
    return found


LINE_END = re.compile(rb"[!-~]\r?\n")
