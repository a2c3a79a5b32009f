"""The documents of a slice, one after another, each stripped."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from . import tables
from .inputs import Slice


class Part(NamedTuple):
    """A document, or a part of one.

    Attributes:
      text: stripped where the document begins and ends; may be empty.
      size: its UTF-8 bytes.
      ends: </s> follows, unless the whole document is empty: that is left out.
      empty: it is.
      read: how much of the slice's size it took.
    """

    text: str
    size: int
    ends: bool
    empty: bool
    read: int


def whole_document(text: str, read: int = 0) -> Part:
    """One that is not stripped yet."""
    text = text.strip()
    return Part(text, len(text.encode()), bool(text), not text, read)


def read_documents(part: Slice, text_field: str) -> Iterator[Part]:
    """What a slice holds.

    Raises:
      ValueError: a file, and its line or row, that cannot be read: not UTF-8, not JSON, no such field, no string.
    """
    if part.kind in ("txt", "jsonl"):
        try:
            if part.kind == "txt":
                yield _text(part)
            else:
                yield from _lines(part, text_field)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{part.path}: cannot be read, or is damaged: {error}") from None
    else:
        for _, text in tables.read(part, text_field):
            document = whole_document(text or "")
            yield document._replace(read=document.size)


def _text(part: Slice) -> Part:
    path = Path(part.path)
    whole = _is_compressed(path)
    with _open(path) as (file, _):
        if not whole:
            file.seek(part.start)
        raw = file.read() if whole else file.read(part.stop - part.start)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + _lines_before(part) + raw.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if part.start == 0:
        text = text.removeprefix("\ufeff").lstrip()
    ends = whole or part.stop == path.stat().st_size
    if ends:  # all others end in what is no space
        text = text.rstrip()
    empty = ends and not text and part.start == 0
    return Part(text, len(text.encode()), ends and not empty, empty, part.size)


def _lines(part: Slice, text_field: str) -> Iterator[Part]:
    path = Path(part.path)
    whole = _is_compressed(path)
    number = at = 0
    with _open(path) as (file, compressed):
        if part.start and not whole:
            file.seek(part.start - 1)
            at = part.start - 1 + len(file.readline())
        seen = 0 if whole else at
        while whole or at < part.stop:
            line = file.readline()
            if not line:
                break
            number += 1
            at += len(line)
            try:
                document = whole_document(_text_of(line, text_field, first=at == len(line)))
            except ValueError as error:
                coded = isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
                reason = f"not UTF-8 ({error.reason})" if coded else error
                raise ValueError(f"{path}, line {number + _lines_before(part)}: {reason}") from None
            place = compressed.tell() if whole else at
            if document.text or line.strip():
                yield document._replace(read=place - seen)
                seen = place


def _text_of(line: bytes, text_field: str, first: bool) -> str:
    """The text of a line; "" of a blank one."""
    written = line.decode("utf-8-sig" if first else "utf-8")
    if not written.strip():
        return ""
    try:
        found = json.loads(written)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); expected one object a line") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object with {text_field!r}, not {type(found).__name__}")
    if text_field not in found:
        raise ValueError(f"no {text_field!r}, only {', '.join(found) or 'nothing'}; choose with --text-field")
    text = found[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{text_field!r} is {type(text).__name__}; expected a string")
    return text or ""


def _lines_before(part: Slice) -> int:
    """Ends of lines before a slice; for messages only, it reads the file to there."""
    if _is_compressed(Path(part.path)) or part.start == 0:
        return 0
    count, left = 0, part.start
    last = b"\n"
    with open(part.path, "rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            count, left, last = count + chunk.count(b"\n"), left - len(chunk), chunk
    # A line that began before the slice belongs to the one before, .txt apart.
    return count + (part.kind == "jsonl" and not last.endswith(b"\n"))


def _is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it reads, and as it lies on the disk."""
    with open(path, "rb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as text:
                yield text, file  # type: ignore[misc]
        elif path.suffix == ".zst":
            with io.BufferedReader(tables.pyarrow_for(path).input_stream(file, compression="zstd"), 1 << 20) as text:
                yield text, file
        else:
            yield file, file
