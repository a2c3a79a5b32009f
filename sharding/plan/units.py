"""Numbers for people."""

from __future__ import annotations


def size(number: float) -> str:
    """Bytes: ``15.0 GiB``; below 0.1 GiB as MiB, below 0.1 MiB as KiB."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= 0.1 * factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number:.0f} B" if number else "0"


def seconds(time: float) -> str:
    """``12.3 s``, ``45.6 ms``, ``7.8 µs``."""
    if time == 0:
        return "0"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if time >= factor or unit == "µs":
            return f"{_three(time / factor)} {unit}"
    raise AssertionError


def flops(number: float) -> str:
    """``3.21 PFLOP``."""
    for factor, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{_three(number / factor)} {letter}FLOP"
    return f"{number:.0f} FLOP"


def rate(number: float) -> str:
    """Of tokens: ``12,300``, or with decimals where it is small."""
    return f"{number:,.0f}" if number >= 100 else _three(number)


def _three(x: float) -> str:
    return f"{x:.{max(0, 3 - len(str(int(x))))}f}"
