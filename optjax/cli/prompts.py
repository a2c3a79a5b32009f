"""Which texts to continue or to score: an argument, a file, or what is piped in."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from optjax.cli.terminal import UsageError, note

SAMPLE = "The old house stood at the end of the road, and"


def read_prompts(words: Sequence[str], file: str | None, *, quiet: bool = False) -> list[str]:
    """The prompts, at least one.

    An argument is one prompt; a file (``-``: standard input) has one on each line, empty lines left out; what is piped
    in without either is one prompt as a whole, less the line's end. A person who gives nothing gets a sample.

    Raises:
      UsageError: several arguments, an argument and a file, a file or a pipe without a prompt.
      ValueError: not UTF-8.
      OSError: the file cannot be read.
    """
    if len(words) > 1:
        raise UsageError(f'several prompts are given; put one in quotes: "{" ".join(words)}", or many in a --file')
    if words and file is not None:
        raise UsageError("give either a PROMPT or --file, not both")
    if words:
        return list(words)
    if file is not None:
        return read_lines(file, "prompt")
    if _something_is_piped():
        prompt = _decode(_read_stdin(), "standard input").rstrip("\r\n")
        if not prompt:
            raise UsageError("standard input held no prompt; pipe a text in, or give one as an argument")
        return [prompt]
    if not quiet:
        note("no prompt is given: here is a sample one")
    return [SAMPLE]


def read_lines(file: str, what: str) -> list[str]:
    """The lines of a file, or of standard input (``-``), that are not empty, at least one.

    Raises:
      UsageError: there is none; ``what`` says what was expected.
      ValueError, OSError: as `read_prompts`.
    """
    return list(read_numbered_lines(file, what).values())


def read_numbered_lines(file: str, what: str) -> dict[int, str]:
    """`read_lines`, each under its number in the file, from 1."""
    # Not splitlines, which also splits at characters that may stand within a text.
    lines = enumerate(read_whole(file).split("\n"), 1)
    found = {i: line.removesuffix("\r") for i, line in lines if line.strip()}
    if not found:
        raise UsageError(f"{name_of(file)} holds no {what}: one is expected on each line")
    return found


def read_whole(file: str) -> str:
    """The text of a file, or of standard input (``-``), less a byte order mark."""
    return _decode(_read_stdin() if file == "-" else Path(file).expanduser().read_bytes(), name_of(file))


def name_of(file: str) -> str:
    return "standard input" if file == "-" else file


def _something_is_piped() -> bool:
    """Whether standard input is a pipe or a file, rather than a terminal or /dev/null."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # not a file of the system
        return True
    return not stat.S_ISCHR(mode)


def _read_stdin() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
