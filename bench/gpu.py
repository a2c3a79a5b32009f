"""What `bench.decode_gpu` and `bench.attention_gpu` share: options, the device, failures, tables and pictures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import report

FULL = "out of memory"
Panels = dict[str, dict[str, list[tuple[float, float]]]]


def add_options(parser: argparse.ArgumentParser, sides: Sequence[str], dtypes: Sequence[str]) -> None:
    add = parser.add_argument
    add("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: a dry run of the program, for tiny shapes")
    add("--dtype", choices=dtypes, default="bfloat16")
    add("--sides", nargs="+", choices=list(sides), default=list(sides))
    add("--rounds", type=int, default=5)
    add("--in-turn", action="store_true", help="one side's process at a time, which has the device to itself")
    add("--threads", type=int, default=2, help="of a dry run")
    add("--save", action="store_true", help="also write tables and pictures to --out")
    add("--out", type=Path, default=report.RESULTS, help="a folder (default: bench/results)")
    add("--json", type=Path, metavar="FILE", help="also write every figure, as they come")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where something is missing that it would find out at its end only."""
    if args.save and importlib.util.find_spec("matplotlib") is None:
        parser.error("--save draws pictures, and matplotlib is not installed: optjax[plot]")
    if args.rounds < 1:
        parser.error(f"--rounds should be at least 1, not {args.rounds}")


def name_of_device(parser: argparse.ArgumentParser, device: str) -> str:
    """The GPU and its driver; ends the program where there is none."""
    if device == "cpu":
        return "A dry run on a CPU, whose times say nothing of a GPU"
    advice = "--device cpu makes a dry run, for tiny shapes"
    if shutil.which("nvidia-smi") is None:
        parser.error(f"there is no GPU here: nvidia-smi is not installed; {advice}")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    if found.returncode or not found.stdout.strip():
        parser.error(
            f"there is no GPU here: {(found.stderr or found.stdout).strip() or 'nvidia-smi is silent'}; {advice}"
        )
    name, memory, driver = (part.strip() for part in found.stdout.splitlines()[0].split(","))
    return f"{name}, {memory}, driver {driver}"


def present(names: dict[str, str], sides: Sequence[str], device: str) -> list[str]:
    """The sides that can take part; says why the others cannot. ``names`` are what to call them."""
    here = []
    for side in sides:
        needs = ["jax"] if side.startswith(("optjax", "jax")) else ["torch", "transformers"]
        needs += ["flash_attn"] if side == "torch-flash" else []
        absent = [name for name in needs if importlib.util.find_spec(name) is None]
        if device == "cpu" and side in ("torch-flash", "jax-cudnn", "optjax-flash"):
            say(f"left out: {names[side]}, which is for GPUs")
        elif absent:
            say(f"left out: {names[side]} ({', '.join(absent)} not installed)")
        else:
            here.append(side)
    return here


def check_device(library: str) -> None:
    """In the process of a side: RuntimeError where its library does not see the GPU, and would use the CPU."""
    if library == "torch":
        import torch

        seen, install = torch.cuda.is_available(), "a build of torch with CUDA"
    else:
        import jax

        seen, install = jax.default_backend() == "gpu", "optjax[cuda]"
    if not seen:
        raise RuntimeError(f"{library} does not see the GPU: install {install}")


def failure(error: Exception) -> str:
    """What a table says of a side that failed. One that runs out of the device's memory is a result; any other error
    is told in full, and the other sides go on."""
    text = str(error).lower()
    # A kernel that wants more of a core's own memory than there is fails on a device of any size.
    if "out of memory" in text or ("resource_exhausted" in text and "shared memory" not in text):
        return FULL
    say(str(error))
    return "failed: " + " ".join(str(error).split()).replace("|", "/")[:120]


def status(results: Sequence[Any]) -> int:
    """What the program ends with: 1 where a side failed otherwise than for memory."""
    return int(any(r.failed not in ("", FULL) for r in results))


def ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """How many times as long the first took: the median of the rounds' ratios.

    Differences of times may be lost in noise, and then be no times: NaN where they are so in a round.
    """
    return median(a / b for a, b in zip(slow, quick, strict=True)) if min(*slow, *quick) > 0 else math.nan


def times(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.2f}×"


def draw(path: Path, panels: Panels, x_label: str, title: str, columns: int) -> None:
    """Speed-ups: for each panel and side, points ``(x, times as fast)``, beside a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    rows = -(-len(panels) // columns)
    size = (max(4 * columns, 7), 2.8 * rows + 1)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    sides = list(dict.fromkeys(side for lines in panels.values() for side in lines))
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for side, points in lines.items():
            points = sorted(point for point in points if not math.isnan(point[1]))
            x, y = zip(*points, strict=True) if points else ((), ())
            # A side has its colour in every panel, also where it has no points.
            axes.plot(x, y, marker="o", label=side, color=f"C{sides.index(side)}")
        axes.axhline(1, color="0.7", linewidth=1, zorder=0)
        axes.set(title=name, xscale="log")
        axes.set_ylim(bottom=0)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    for row in grid:
        row[0].set_ylabel("times as fast")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a Markdown table; all but the first ``left`` columns are figures."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "-|" * left + "-:|" * (len(columns) - left)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def setting(device: str, versions: dict[str, str], dtype: str, rounds: int) -> str:
    """A paragraph: the machine, and who took part."""
    about = report.machine()
    who = "; ".join(f"{side}: {version}" for side, version in versions.items())
    host = f"{about['processor']}, {about['cores']} cores, {about['memory']}"
    return f"{device}; {host}. {dtype}, {rounds} rounds. {who}; Python {about['python']}. {about['date']}."


def command(program: str, args: argparse.Namespace, names: Sequence[str]) -> str:
    """What makes the same table again, to be shown as code."""
    words = []
    for name in names:
        value: Any = vars(args)[name]
        if isinstance(value, bool):
            words += [f"--{name.replace('_', '-')}"] if value else []
            continue
        words.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return f"    python -m {program} {' '.join(words)} --save"


def keep(results: Sequence[Any], args: argparse.Namespace) -> None:
    """Writes all figures so far: who has the device for some minutes may not see the end."""
    if args.json:
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps([asdict(r) for r in results], indent=1))
        partial.replace(args.json)


def publish(
    program: str, lines: Sequence[str], results: Sequence[Any], draw_size: Any, sizes: Sequence[str], args: Any
) -> None:
    """Prints a page, and writes what ``args`` ask for: the page, and a picture for each of the sizes.

    ``draw_size`` takes the picture's path and the results of one size.
    """
    print("\n".join(lines))
    if args.save:
        args.out.mkdir(exist_ok=True)
        page = args.out / f"{program}.md"
        page.write_text("\n".join(lines) + "\n")
        for size in sizes:
            if found := [r for r in results if r.size == size]:
                draw_size(args.out / f"{program}_{size}.png", found)
        print(f"wrote {page} and its pictures")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
