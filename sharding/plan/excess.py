"""The part of the page that says why a peak stands above the least memory; see `working_set`."""

from __future__ import annotations

from typing import Any

from . import units

FAR = 1.15
WHY = f"""
## What stands above the least

Of the rows whose peak is over {FAR} × the least: *above*, what the peak has more than the least; then what a device has
in use while it computes, part by part, and not all of it at the same moment. A star marks what is more than all of them
together, and not explained by them. All of these parts are of one layer, or of one piece of a row, whatever the size of
the slice: so they weigh most where a device keeps little, in small models and over many devices. Two layers' weights
are there so that the next one's arrive while one computes. More micro-batches shrink values and scores,
`--attn-implementation flash` leaves the scores out, and `tensor=` in the mesh divides all parts.
"""


def over(made: dict[str, Any]) -> float:
    """The peak as a multiple of the least, in the program where that is most; of a plan's data."""
    return max(step["peak_over_least"] for step in made["steps"].values())


def above(made: dict[str, Any]) -> int:
    """Bytes by which the peak stands above the least, in the program where that is most."""
    return max(sum(step["memory"].values()) - step["least_memory"]["total"] for step in made["steps"].values())


def table(rows: list[tuple[dict[str, Any], dict[str, int]]]) -> list[str]:
    """Lines of markdown, one for each plan's data and its working set."""
    parts = list(dict.fromkeys(part for _, in_use in rows for part in in_use))
    lines = [f"| size | job | slice | peak | above | {' | '.join(parts)} |", "|-" * (5 + len(parts)) + "|"]
    for made, in_use in rows:
        cells = [made["size"], made["job"], made["topology"], f"{over(made):.2f}×"]
        cells.append(units.size(above(made)) + " *" * (above(made) > sum(in_use.values())))
        cells += [units.size(in_use[part]) if part in in_use else "" for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
