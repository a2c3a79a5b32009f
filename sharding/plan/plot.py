"""A plan as a picture: what fills a device's memory, and what takes a step's time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import units

if TYPE_CHECKING:
    from .planning import Plan, Step

_COLORS = {
    "weights": "#4477aa",
    "optimizer state": "#66ccee",
    "gradients": "#228833",
    "cache": "#ccbb44",
    "activations kept": "#aa3377",
    "other": "#bbbbbb",
    "temporaries": "#ee6677",
}
_RATES = ("compute", "memory", "interconnect", "host", "disk")


def plot(plan: Plan, path: str | Path | None = None) -> Any:
    """Stacked bars of memory against the capacity, and bars of the time that each rate limit takes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    left, right = sides
    _draw_memory(plan, left.subplots())
    times = right.subplots(len(plan.steps), 1, squeeze=False)[:, 0]
    for (name, step), axes in zip(plan.steps.items(), times, strict=True):
        _draw_time(name, step, axes)
    request = plan.request
    figure.suptitle(f"{request.size}, {request.job}, on {plan.topology.name} ({plan.topology.devices} devices)")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_memory(plan: Plan, axes: Any) -> None:
    gib = 2**30
    seen = set()
    for x, step in enumerate(plan.steps.values()):
        bottom = 0.0
        for part, size in step.memory().items():
            label = None if part in seen else part
            seen.add(part)
            axes.bar(x, size / gib, 0.6, bottom=bottom, label=label, color=_COLORS.get(part, "#777777"))
            bottom += size / gib
        axes.text(x, bottom, f"{bottom:.1f}", ha="center", va="bottom")
    axes.axhline(plan.capacity / gib, color="black", linestyle="--", linewidth=1, label="capacity")
    axes.set_xticks(range(len(plan.steps)), list(plan.steps))
    axes.set_xlim(-0.6, len(plan.steps) - 0.4)
    axes.set_ylim(0, 1.15 * max(plan.capacity, plan.peak) / gib)
    axes.set_ylabel("GiB on a device")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)


def _draw_time(name: str, step: Step, axes: Any) -> None:
    rates = [rate for rate in _RATES if rate not in ("host", "disk") or getattr(step.roofline, rate)]
    values = [getattr(step.roofline, rate) for rate in rates]
    colors = ["#4477aa" if rate == step.roofline.bound else "#bbccdd" for rate in rates]
    bars = axes.barh(range(len(rates)), [1e3 * value for value in values], 0.7, color=colors)
    axes.bar_label(bars, [units.seconds(value) for value in values], padding=3)
    axes.set_yticks(range(len(rates)), rates)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(f"ms of a {name}, at least")
