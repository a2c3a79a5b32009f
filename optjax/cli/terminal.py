"""What the commands say to the person in front of them: notes, errors, colour where it can be seen."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class UsageError(Exception):
    """A command that makes no sense; exit status 2."""


@contextmanager
def usable_streams() -> Iterator[None]:
    """Standard output and error that take any text: one that is closed loses it, and none fails for its encoding."""
    given = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (nowhere if stream is None else stream for stream in given)
        out = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None
        errors = None if out is None else out.errors
        if out is not None and errors in ("strict", "surrogateescape"):
            out.reconfigure(errors="replace")
        try:
            yield
        finally:
            if out is not None and not out.closed:
                out.reconfigure(errors=errors)
            sys.stdout, sys.stderr = given


def report(error: Exception) -> int:
    """Prints an error without its traceback; the exit status that goes with it."""
    text = str(error).strip()
    if isinstance(error, UsageError):
        status = 2
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text, status = f"{error.filename}: {error.strerror}", 1
    elif isinstance(error, ValueError | OSError | ImportError):
        status = 1
    # Of a GPU core's own memory a kernel wants too much, whatever the device has.
    elif isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in text and "Shared memory" not in text):
        needs = "the device has too little memory; try 16 or 8 bits, a smaller model or batch, or more devices"
        text, status = f"out of memory: {needs}", 1
    else:
        text, status = f"{type(error).__name__}: {text or 'no more is known'} (--debug shows where)", 1
    error_line(text)
    return status


def error_line(text: str) -> None:
    print(paint("optjax: error:", "31;1", sys.stderr), text, file=sys.stderr)


def note(text: str) -> None:
    """A line on standard error, dim where that can be seen."""
    print(paint(text, "2", sys.stderr), file=sys.stderr, flush=True)


def status(text: str) -> None:
    """What is going on now, on a line of standard error that the next one replaces; on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{paint(text, '2', sys.stderr)}", end="", file=sys.stderr, flush=True)


def paint(text: str, code: str, stream: TextIO) -> str:
    """``text`` in an ANSI style, where ``stream`` is a terminal that shows it (https://no-color.org)."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not text
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def write(text: str, style: str = "") -> None:
    """Text on standard output at once. On a terminal, control characters that a model wrote are not obeyed."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    text = paint(text, style, sys.stdout) if style else text
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:  # a terminal or a locale that is not UTF-8
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def silence_stdout() -> None:
    """Nobody reads standard output any more: what Python still flushes at its end must not fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file, as within tests
        pass
