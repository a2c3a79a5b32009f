"""The figures of `bench.decode_compiled` as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.compiled_worker import SLICES, Case

# Of the core, Hz; the compiler counts in its cycles.
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
NAMES = {"optjax": "optjax", "flax": "FlaxOPT"}
COLUMNS = ("", "bytes read, GB", "roofline, ms", "estimate, ms", "× roofline", "× products")
COLUMNS += ("FlaxOPT / optjax", "temporaries, MB")
ABOUT = """\
Nothing here was run: these are the compilers' own figures, for one chip, in bfloat16, with a cache of {context} columns
that is full. *Bytes read*: weights and cache, each once, which is the least that a step can read. *Roofline*: the time
that takes at the bandwidth of the data sheet. *Estimate*: the cycles that the TPU compiler reckons for each operation,
summed, at the chip's clock, with attention by the plain path. It is not calibrated: it has one plain product with a
large matrix, which does nothing but read it, at 1.3-1.5 × the roofline on v5e, 1.6-1.8 × on v5p and 1.15-1.25 × on v6e.
And copies into fast memory that run beside other operations count nothing: where it is below the roofline, the roofline
holds. So it serves to compare programs. *Products*: beside the same estimate of a program which does no more than to
multiply each matrix, and the keys and values of each row, by something, once. The GPU compiler estimates nothing.
*Temporaries*: of the program with more layers.

Of each case programs of 2 and 4 layers are compiled, and what the two more add is counted for all others. A star marks
what does not fit on one chip.
"""


def markdown(known: list[dict[str, Any]]) -> str:
    """The page, from cases and what was found of each."""
    found = {Case(**each["case"]): each["found"] for each in known}
    contexts = sorted({case.context for case in found})
    lines = ["# A decode step as the compilers see it", "", "    python -m bench.decode_compiled", ""]
    lines += [ABOUT.format(context=" or ".join(map(str, contexts)))]
    rows = {case: whole(case, found) for case in found if case.layers == 2 and replace(case, layers=4) in found}
    shown = [case for case in rows if case.side != "products"]
    for context in contexts:
        lines += [
            f"{context} columns:",
            "",
            *_summary({c: each for c, each in rows.items() if c.context == context}),
            "",
        ]
    for chip, context in itertools.product(SLICES, contexts):
        own = [case for case in shown if (case.chip, case.context) == (chip, context)]
        if own:
            lines += [
                f"## {chip}, {context} columns",
                "",
                f"| {' | '.join(COLUMNS)} |",
                "|-" + "|-:" * (len(COLUMNS) - 1) + "|",
            ]
            order = sorted(own, key=lambda c: (_number(c.size), c.batch, c.side != "optjax", str(c)))
            lines += [f"| {' | '.join(_row(case, rows))} |" for case in order]
            lines += [""]
    checked = list(_checks(found, rows))
    if checked:
        lines += [
            "## The extrapolation beside whole programs",
            "",
            "| | whole, ms | from 2 and 4 layers, ms |",
            "|-|-:|-:|",
        ]
        lines += [*checked, ""]
    return "\n".join(lines)


def _summary(rows: dict[Case, dict[str, Any]]) -> Iterator[str]:
    """How far the figures are from what they are measured by, in a sentence each."""
    plain = [case for case in rows if case.quantization is None and case.cache_dtype is None]
    times = {case: seconds(case, rows[case]) for case in plain if "error" not in rows[case]}
    times = {case: time for case, time in times.items() if time is not None}
    ours = {case: time for case, time in times.items() if case.side == "optjax"}
    theirs = [times[flax] / time for case, time in ours.items() if (flax := replace(case, side="flax")) in times]
    if theirs:
        yield f"- FlaxOPT's step is estimated at {min(theirs):.2f} to {max(theirs):.2f} times optjax's."
    many = {case: time for case, time in ours.items() if case.batch >= 8}
    bare = {case: times.get(replace(case, side="products"), 0.0) for case in many}
    near = [time <= 1.25 * max(least_seconds(case, rows[case]), bare[case]) for case, time in many.items()]
    if near:
        yield f"- With 8 rows or more {sum(near)} of {len(near)} are within 1.25 × roofline or products."


def whole(case: Case, found: dict[Case, dict[str, Any]], layers: int | None = None) -> dict[str, Any]:
    """All layers' figures, from those of 2 and 4; where one was refused, its error."""
    import optjax

    few, more = found[replace(case, layers=2)], found[replace(case, layers=4)]
    for each in (few, more):
        if "error" in each:
            return each
    pairs = (optjax.OPTConfig.preset("opt-" + case.size).num_hidden_layers - 4) / 2
    figures = {
        name: more[name] + pairs * (more[name] - few[name])
        for name in ("cycles", "weights", "cache", "peak")
        if name in more
    }
    return figures | {"temporaries": more["temporaries"]}


def seconds(case: Case, figures: dict[str, Any]) -> float | None:
    """By the compiler's estimate, where it makes one."""
    return figures["cycles"] / CLOCK[case.chip] if "cycles" in figures else None


def least_seconds(case: Case, figures: dict[str, Any]) -> float:
    """What memory and matrix unit allow at their peak rates."""
    from optjax.sharding.plan import CHIPS

    chip = CHIPS[case.chip]
    # Each weight and each key and value is multiplied once for a row; of 2 bytes each where none is quantized.
    operations = figures["weights"] * case.batch + figures["cache"]
    return max((figures["weights"] + figures["cache"]) / chip.hbm_bandwidth, operations / chip.flops)


def _row(case: Case, rows: dict[Case, dict[str, Any]]) -> list[str]:
    from optjax.sharding.plan import CHIPS

    figures = rows[case]
    also = [f"weights {case.quantization}"] * bool(case.quantization) + [f"cache {case.cache_dtype}"] * bool(
        case.cache_dtype
    )
    name = ", ".join([f"{case.size}, batch {case.batch}", NAMES[case.side], *also])
    if "error" in figures:
        return [name, figures["error"].split(":")[0], *[""] * (len(COLUMNS) - 2)]
    if figures["weights"] + figures["cache"] > CHIPS[case.chip].capacity:
        name += " *"
    least, estimate = least_seconds(case, figures), seconds(case, figures)
    ours = rows.get(replace(case, side="optjax"))
    bare = rows.get(replace(case, side="products", quantization=None, cache_dtype=None))
    products = None if bare is None or "error" in bare or also else seconds(case, bare)
    own = seconds(case, ours) if case.side == "flax" and ours and "error" not in ours else None
    return [
        name,
        f"{(figures['weights'] + figures['cache']) / 1e9:.2f}",
        f"{1e3 * least:.2f}",
        "" if estimate is None else f"{1e3 * estimate:.2f}",
        "" if estimate is None else f"{estimate / least:.2f}",
        "" if products is None or estimate is None else f"{estimate / products:.2f}",
        "" if own is None or estimate is None else f"{estimate / own:.2f}",
        f"{figures['temporaries'] / 1e6:.1f}",
    ]


def _checks(found: dict[Case, dict[str, Any]], rows: dict[Case, dict[str, Any]]) -> Iterator[str]:
    for case, figures in found.items():
        made = rows.get(replace(case, layers=2))
        if case.layers in (2, 4) or made is None or "cycles" not in made or "cycles" not in figures:
            continue
        both = (f"{1e3 * (seconds(case, each) or 0):.2f}" for each in (figures, made))
        yield f"| {case.size}, batch {case.batch}, {NAMES[case.side]}, {case.chip} | {' | '.join(both)} |"


def _number(size: str) -> float:
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
