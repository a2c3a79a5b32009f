"""The curves of a run as one page, `report.html`, which needs nothing else.

  python -m optjax.train.report runs/first
  python -m optjax.train.report runs/first --picture curves.png    # the curves alone, .png or .svg

at any time; a run writes it when it ends. Needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

from .log import read_events, read_log

FILE = "report.html"
# Names of figures, their titles, and whether their scale is logarithmic; those that a log has none of are left out.
PANELS = (
    ("loss", "loss", False),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", False),
    ("tokens_per_second", "tokens/s", False),
    ("mfu", "model FLOP/s, share of the peak", False),
    ("memory", "device memory, GiB", False),
    ("loss_scale", "loss scale", True),
)
_UNITS = {"memory": 2.0**30}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:.8rem}"
)


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run's folder; returns its path.

    Raises:
      FileNotFoundError: the folder has no log, or one without entries.
      ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    entries, events = _entries(folder), read_events(folder)
    parts = [f"<h1>{html.escape(folder.resolve().name)}</h1>", _summary(folder, entries)]
    parts += [_svg(_curves(entries, events)), _events(events), _samples(entries), _settings(folder)]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.resolve().name)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.rename(path)
    return path


def write_picture(folder: str | Path, path: str | Path) -> Path:
    """The curves of a run's folder alone, as .png or .svg by the path's ending; returns the path.

    Raises:
      FileNotFoundError: the folder has no log, or one without entries.
      ImportError: matplotlib is not installed.
      ValueError: another ending.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture is .png or .svg, not {path.name}")
    figure = _curves(_entries(folder), read_events(folder))
    _save(figure, path, path.suffix[1:])
    return path


def try_report(folder: str | Path) -> str:
    """`write_report`, where a reason not to is no error: a line that says where it is, or why it is not."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no report.html: matplotlib is not installed; pip install 'optjax[plot]'"
    try:
        return f"the run's curves: {write_report(folder)}"
    except (FileNotFoundError, OSError) as error:
        return f"no report.html: {error}"


def _entries(folder: Path) -> list[dict[str, Any]]:
    entries = read_log(folder, everything=True)
    if not entries:
        raise FileNotFoundError(f"no entries in {folder / 'log.jsonl'}; expected the folder of a run")
    return entries


def _summary(folder: Path, entries: list[dict[str, Any]]) -> str:
    kept = read_log(folder)
    last = (kept or entries)[-1]
    rows = [("steps", f"{last['step']:,}"), ("last loss", f"{last['loss']:.4f}")]
    for name in sorted({name for entry in kept for name in entry if name.startswith("validation_")}):
        values = [(entry[name], entry["step"]) for entry in kept if name in entry]
        rows.append((f"last {name.replace('_', ' ')}", f"{values[-1][0]:.4f} (step {values[-1][1]:,})"))
    speeds = sorted(entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry)
    if speeds:
        rows.append(("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    skipped = sum(entry.get("skipped", 0) for entry in entries)
    rows.append(("steps skipped", f"{skipped:,}"))
    rows.append(("rollbacks", str(sum("back_to" in event for event in read_events(folder)))))
    return _table(rows)


def _curves(entries: list[dict[str, Any]], events: list[dict[str, Any]]) -> Any:
    """A figure of all panels; what was rolled back is grey."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(_finite(entry.get(panel[0])) for entry in entries)]
    more = {name for entry in entries for name in entry if name.startswith("validation_")} - {"validation_loss"}
    panels += [(name, name.replace("_", " "), False) for name in sorted(more)]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    lines = _lines(entries, events)
    for (name, title, log), ax in zip(panels, axes, strict=False):
        unit = _UNITS.get(name, 1.0)
        for line, gone in lines:
            points = [(entry["step"], entry[name] / unit) for entry in line if _finite(entry.get(name))]
            marker = "." if len(points) < 40 else None
            color, order = ("#bbb", 1) if gone else ("C0", 2)
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, zorder=order, lw=1.2) if points else None
        if name == "loss":
            found = [(e["step"], e["validation_loss"]) for e in lines[-1][0] if _finite(e.get("validation_loss"))]
            if found:
                ax.plot(*zip(*found, strict=True), color="C1", marker="o", ms=3, zorder=3, label="validation")
                ax.legend(frameon=False)
        for event in events:
            if "back_to" in event:
                ax.axvline(event["step"], color="C3", lw=0.8, ls=":", zorder=0)
        if log and all(entry.get(name, 1) > 0 for entry in entries):
            ax.set_yscale("log")
        else:
            _scale(ax, [entry[each] / unit for entry in lines[-1][0] for each in (name, f"validation_{name}")
                        if _finite(entry.get(each))], from_zero=name == "tokens_per_second")  # fmt: skip
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.set_xlabel("step")
    return figure


def _svg(figure: Any) -> str:
    text = io.StringIO()
    _save(figure, text, "svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _save(figure: Any, to: Any, format: str) -> None:
    import matplotlib

    # Without a date and with the same ids, the same log makes the same picture.
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "optjax", "svg.fonttype": "none"}):
        figure.savefig(to, format=format, metadata=metadata, dpi=110)


def _scale(ax: Any, values: list[float], from_zero: bool) -> None:
    """A scale for what counts: spikes that were rolled back leave it at the top."""
    low, high = (min([0.0] if from_zero else values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    ax.set_ylim(low if from_zero else low - room, high + room)


def _lines(entries: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], bool]]:
    """The entries that were rolled back, each time a line, and at last those that count."""
    backs = [event["back_to"] for event in events if "back_to" in event]
    lines, current = [], []
    for entry in entries:
        if current and entry["step"] <= current[-1]["step"]:
            back = next((b for b in backs if b < entry["step"]), 0)
            backs = backs[backs.index(back) + 1 :] if back in backs else backs
            kept = [before for before in current if before["step"] <= back]
            lines.append((current[max(0, len(kept) - 1) :], True))
            current = kept
        current.append(entry)
    return [*lines, (current, False)]


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = [(f"step {event['step']:,}", event["text"]) for event in events]
    return "<h2>What happened</h2>" + _table(rows)


def _samples(entries: list[dict[str, Any]]) -> str:
    found = [entry for entry in entries if entry.get("samples")]
    if not found:
        return ""
    texts = "".join(f"<pre>{html.escape(text)}</pre>" for text in found[-1]["samples"])
    return f"<h2>Texts at step {found[-1]['step']:,}</h2>{texts}"


def _settings(folder: Path) -> str:
    parts = []
    for name in ("settings.json", "run.json"):
        if (folder / name).is_file():
            text = json.dumps(json.loads((folder / name).read_text(encoding="utf-8")), indent=1)
            parts.append(f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>")
    return "<h2>Settings</h2>" + "".join(parts) if parts else ""


def _table(rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run; it may still be going on")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the curves alone, as .png or .svg")
    args = parser.parse_args(argv)
    try:
        print(f"wrote {write_report(args.run) if args.picture is None else write_picture(args.run, args.picture)}")
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
