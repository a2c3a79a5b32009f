"""Large numbers for people."""

from __future__ import annotations


def count(n: int) -> str:
    """``125M``, ``1.32B``: three digits."""
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= factor:
            return f"{_digits(n / factor)}{letter}"
    return str(n)


def size(n: int) -> str:
    """Bytes as ``239 MiB``: three digits, powers of 1024, which is how memory is sold."""
    for i, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB")):
        if n < 1024 ** (i + 1) or unit == "TiB":
            return f"{_digits(n / 1024**i)} {unit}" if i else f"{n} B"
    raise AssertionError


def _digits(x: float) -> str:
    return f"{x:.{max(0, 3 - len(str(int(x))))}f}"
