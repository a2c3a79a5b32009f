"""A plan as a table: for a terminal, for a notebook, as text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from optjax.sharding.mesh import format_mesh

from . import units

if TYPE_CHECKING:
    from .planning import Plan

NOTES = (
    "Peak and temporaries: the compiler's. At least: weights and cache; or weights, optimizer state, gradients and "
    "what is kept for the backward pass. Times: the least that each takes at the chip's peak rates; the floor is the "
    "slowest of them, as if they ran side by side."
)


def verdict(plan: Plan) -> str:
    """Whether it fits, in a line."""
    need, have = units.size(plan.peak), units.size(plan.capacity)
    if plan.fits:
        return f"fits: {need} of {have} on each device, {units.size(plan.spare)} to spare"
    if plan.spare >= 0:
        return f"does not fit: the compiler refuses it at {need} of {have} on each device"
    return f"does not fit by {units.size(-plan.spare)}: {need} of {have} on each device"


def render(plan: Plan, console: Any) -> None:
    """Prints a plan on a rich console."""
    request, topology = plan.request, plan.topology
    rules = request.rules if isinstance(request.rules, str) else "of one's own"
    devices = f"{topology.devices} device{'s' * (topology.devices > 1)}"
    console.print(
        f"{request.size}, {request.job}, on {topology.name}: {devices} of {topology.chip.title}", style="bold"
    )
    optional = ("offload", "disk_bandwidth")
    given = {name: value for name, value in request.options.items() if value is not None or name not in optional}
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    console.print(f"mesh {format_mesh(request.mesh)}; rules {rules}; {options}")
    console.print(verdict(plan), style="bold green" if plan.fits else "bold red")
    console.print()
    console.print(_memory(plan))
    console.print()
    in_use = ", ".join(f"{part} {units.size(bytes)}" for part, bytes in plan.working_set.items())
    console.print(f"In use while it computes, beside the least and not all at once: {in_use}.")
    console.print()
    console.print(_time(plan))
    for name, step in plan.steps.items():
        if step.compiled.traffic:
            console.print()
            console.print(_traffic(name if len(plan.steps) > 1 else "", step.compiled.traffic))
    console.print()
    if plan.gathered_whole:
        warning = "the partitioner gathered whole arrays for want of a better way (involuntary rematerialization)"
        console.print(f"{warning}: {plan.gathered_whole}", style="yellow")
    console.print(f"Compiled in {units.seconds(plan.seconds)}.", style="dim")
    console.print(NOTES, style="dim")


def _new_table() -> Any:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def _memory(plan: Plan) -> Any:
    table = _new_table()
    table.add_column("memory of a device")
    memories = {name: step.memory() for name, step in plan.steps.items()}
    for name in memories:
        table.add_column(name, justify="right")
    rows = list(dict.fromkeys(part for memory in memories.values() for part in memory))
    rows.sort(key=lambda part: part == "temporaries")
    for part in rows:
        table.add_row(part, *(units.size(memory.get(part, 0)) for memory in memories.values()))
    table.add_row("peak", *(units.size(step.compiled.peak) for step in plan.steps.values()), style="bold")
    table.add_row("at least", *(units.size(step.work.least_memory) for step in plan.steps.values()))
    table.add_row("peak ÷ at least", *(f"{step.over:.2f}" for step in plan.steps.values()))
    table.add_row("capacity", *(units.size(plan.capacity) for _ in memories))
    if plan.request.options.get("offload") is not None:
        table.add_row("weights elsewhere", *(units.size(step.work.host_bytes) for step in plan.steps.values()))
    return table


def _time(plan: Plan) -> Any:
    table = _new_table()
    table.add_column("a step at least")
    for name in plan.steps:
        table.add_column(name, justify="right")
    steps = plan.steps.values()

    def row(title: str, values: Any, style: str = "") -> None:
        table.add_row(title, *values, style=style)

    row("FLOPs of a device", (units.flops(step.work.flops) for step in steps))
    row("bytes through its memory", (units.size(step.work.hbm_bytes) for step in steps))
    row("compute", (units.seconds(step.roofline.compute) for step in steps))
    row("memory", (units.seconds(step.roofline.memory) for step in steps))
    row("interconnect", (_or_unknown(step, units.seconds(step.roofline.interconnect)) for step in steps))
    for name, title in (("host", "host link"), ("disk", "disk")):
        if any(getattr(step.roofline, name) for step in steps):
            row(title, [units.seconds(getattr(step.roofline, name)) for step in steps])
    row("floor", (units.seconds(step.roofline.floor) for step in steps), "bold")
    row("bound by", (step.roofline.bound for step in steps))
    row("utilization (MFU) at most", (f"{step.roofline.mfu:.1%}" for step in steps))
    row("tokens/s at most", (units.rate(step.roofline.tokens_per_second) for step in steps))
    return table


def _or_unknown(step: Any, text: str) -> str:
    """Of a program that the compiler refused, the collectives are not known."""
    return "not known" if step.compiled.refused else text


def _traffic(name: str, lines: Any) -> Any:
    table = _new_table()
    for title in (f"collectives{' of ' + name if name else ''}", "over"):
        table.add_column(title)
    for title in ("count", "overlapped", "largest", "bytes a device", "at least"):
        table.add_column(title, justify="right")
    for each in lines:
        table.add_row(
            each.kind,
            " × ".join(each.axes),
            f"{each.count:,}",
            f"{each.overlapped:,}",
            units.size(each.largest),
            units.size(each.bytes),
            units.seconds(each.seconds),
        )
    return table


def as_text(plan: Plan, width: int = 120) -> str:
    """Plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    render(plan, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def as_html(plan: Plan) -> str:
    """For a notebook."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, highlight=False, record=True, force_jupyter=False)
    render(plan, console)
    style = "white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace"
    return console.export_html(inline_styles=True, code_format=f"<pre style='{style}'>{{code}}</pre>")
