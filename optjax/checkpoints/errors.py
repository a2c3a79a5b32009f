"""The one error of reading checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit its config. The message lists everything that is wrong."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns whatever goes wrong while parsing a file that nobody vouches for into a `CheckpointError` naming it."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise
    except Exception as error:  # A broken file can break a parser in any way at all.
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {shorten(str(error))}") from error


def listing(kind: str, items: list[str]) -> str:
    """A heading and up to 20 lines; the rest is counted."""
    lines = [f"{len(items)} {kind}:", *(f"  {item}" for item in items[:SHOWN])]
    if len(items) > SHOWN:
        lines.append(f"  … and {len(items) - SHOWN} more")
    return "\n".join(lines)


def shorten(text: str, limit: int = 200) -> str:
    """Text from a file, made safe for a message: one line of printable characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"
