"""The page of plans, sharding/PLANS.md: what each size needs on the slices that people rent, as the compilers said it.

``python -m optjax.sharding.plan.page`` compiles what is not in PLANS.json yet, a row at a time, and writes both; each
row takes a minute or so for the large sizes, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optjax.presets import PRESETS

from . import excess, units
from .estimate import memory
from .hardware import CHIPS, parse_topology, shapes
from .planning import run
from .request import Request, make_request
from .search import combinations, least
from .working_set import working_set

SIZES = [name for name in PRESETS if name.startswith("opt-")]
RENTED = ("v5e", "v6e", "v5p", "tpu7x", "h100")
JOBS = {"train": {}, "generate": {"batch": 8}}
# Beyond the smallest slices: what a person with a certain slice asks, as the options of `optjax plan`.
ALSO = """\
opt-125m --topology v5e:1x1
opt-1.3b --topology v5e:4x4
opt-1.3b --topology h100:8
opt-6.7b --topology v5p:4x4x4
opt-13b --topology h100:64
opt-30b --topology v6e:16x16
opt-66b --topology v5p:4x4x8
opt-175b --topology v5e:16x16 --mesh fsdp=32,tensor=8 --batch 1024
opt-175b --topology v5e:8x16 --mesh fsdp=16,tensor=8 --batch 1024 --moments-dtype bfloat16
opt-175b --topology v5p:4x4x4 --mesh fsdp=16,tensor=4 --batch 1024
opt-175b --topology v5p:2x4x4 --mesh fsdp=8,tensor=4 --batch 1024
opt-175b --topology v5p:4x4x8 --mesh fsdp=32,tensor=4 --batch 1024
opt-175b --topology 2xv5e:16x16 --mesh data=2,fsdp=32,tensor=8 --batch 1024
opt-175b --topology h100:64 --mesh fsdp=8,tensor=8 --batch 1024
opt-175b --topology v5p:2x2x2 --job generate --batch 32
opt-175b --topology h100:8 --job generate --batch 16
opt-175b --topology v6e:4x4 --job generate --batch 8
opt-66b --topology v5p:2x2x1 --job generate --batch 32
opt-30b --topology v6e:2x4 --job generate --batch 16
opt-13b --topology v5e:2x4 --job generate --batch 16
"""

HEAD = """\
# What each size needs

Written by `python -m optjax.sharding.plan.page`. Every row was compiled, by the TPU compiler (libtpu) or by XLA's for
GPU, on a machine that has neither; nothing was run. The command at the end of a row makes it again, with all that is
left out here.

To train: float32 weights and moments unless the command says otherwise, bfloat16 compute, rows of 2048 tokens, the
paper's batch in as many micro-batches as cost no time, each layer's input kept. To generate: bfloat16, caches of 2048
tokens, prompts read 512 tokens at a time.

Peak: what one device holds at the worst moment, of what a program can use; in brackets, how often that is the least
that the job can do with. Floor: the least time of a step, by what it computes, moves through memory and sends, each at
the chip's peak rate. MFU and tokens/s are those of the floor. A dash: not compiled yet; *more*: than the largest slice.
"""


@dataclass(frozen=True)
class Row:
    """One line: a request in the form of a command's words, and what came of it."""

    command: str
    made: dict[str, Any]

    @property
    def fits(self) -> bool:
        return self.made["fits"]

    def request(self) -> Request:
        """What was compiled."""
        return from_words(self.command.removeprefix("optjax plan "))


class Page:
    """Rows by their command, kept in a JSON file after each one; ``wanted`` says of a command whether to compile it."""

    def __init__(self, file: Path, wanted: Callable[[str], bool] = lambda command: True):
        self.file, self.wanted = file, wanted
        self.rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def row(self, request: Request) -> Row | None:
        """A row, compiled if it is not here yet; None where it is not wanted."""
        command = request.command()
        if command not in self.rows:
            if not self.wanted(command):
                return None
            print(f"compiling: {command}", file=sys.stderr, flush=True)
            self.rows[command] = shorten(run(request).to_dict())
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
            partial.rename(self.file)
        return Row(command, self.rows[command])


def shorten(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan's data without the lists of collectives."""
    steps = {name: {k: v for k, v in step.items() if k != "compiled"} for name, step in plan["steps"].items()}
    seconds = sum(step["compiled"]["seconds"] for step in plan["steps"].values())
    return plan | {"steps": steps, "compile_seconds": seconds}


def ladder(chip: str) -> Iterator[str]:
    """Slices of a chip from the smallest on, each about twice the one before."""
    if CHIPS[chip].platform == "gpu":
        yield from (f"{chip}:{n}" for n in (1, 8, 16, 32, 64, 128, 256))
        return
    before = 0
    for shape in shapes(CHIPS[chip]):
        if math.prod(shape) >= 2 * before and math.prod(shape) <= 1024:
            before = math.prod(shape)
            yield f"{chip}:{'x'.join(map(str, shape))}"


def smallest(page: Page, size: str, chip: str, job: str, options: dict[str, Any]) -> Iterator[Row]:
    """The smallest slice of a chip that a job fits; before it, the one that is large enough by the analytic minimum and
    still is not, if there is one."""
    for topology in ladder(chip):
        for request in _attempts(size, topology, job, options):
            row = page.row(request)
            if row is None:
                return
            yield row
            if row.fits:
                return


def _attempts(size: str, topology: str, job: str, options: dict[str, Any]) -> Iterator[Request]:
    """The mesh that is chosen by default, and the one that by estimate takes the least memory, where they might fit."""
    slice_, first = parse_topology(topology), None
    try:
        first = make_request(size, slice_, job, **options)
    except ValueError:
        pass  # no such mesh of so many devices
    if first is not None and least(first) <= slice_.chip.capacity:
        yield first
    thrifty = options if job == "generate" else {**options, "remat": "full"}
    others = [each for each in combinations(size, slice_, job, **thrifty) if least(each) <= slice_.chip.capacity]
    if others:
        other = min(others, key=memory)
        if first is None or other.command() != first.command():
            yield other


def from_words(text: str) -> Request:
    """A request from the words of a command: ``opt-13b --topology h100:8 --job generate --batch 16``."""
    size, *words = shlex.split(text)
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    options: dict[str, Any] = {n: int(v) if v.isdigit() else v for n, v in zip(names, words[1::2], strict=True)}
    return make_request(size, options.pop("topology"), options.pop("job", "train"), **options)


def write(rows: dict[str, list[Row]], smallest_of: dict[tuple[str, str, str], Row], path: Path) -> None:
    """The page in markdown."""
    lines = [HEAD]
    for job, title in (("train", "training"), ("generate", "generation, 8 rows")):
        lines += [f"\n## The smallest slice for {title}\n", f"| size | {' | '.join(RENTED)} |"]
        lines.append("|-|" + "-|" * len(RENTED))
        for size in SIZES:
            cells = [_slice(smallest_of.get((size, chip, job))) for chip in RENTED]
            lines.append(f"| {size} | {' | '.join(cells)} |")
    for job, title in (("train", "Training"), ("generate", "Generation: a decode step")):
        lines += [f"\n## {title}\n", *_table(rows[job])]
    far = [row for job in JOBS for row in rows[job] if excess.over(row.made) > excess.FAR]
    lines += [excess.WHY, *excess.table([(row.made, working_set(row.request())) for row in far])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _slice(row: Row | None) -> str:
    if row is None:
        return "–"
    return row.made["topology"].partition(":")[2] if row.fits else "more"


def _table(rows: list[Row]) -> list[str]:
    titles = "size | slice | mesh | batch | peak | fits | floor | bound by | MFU ≤ | tokens/s ≤ | compiled in | command"
    lines = [f"| {titles} |", "|-" * 12 + "|"]
    for row in rows:
        made = row.made
        step = list(made["steps"].values())[-1]
        floor = step["seconds_at_least"]
        spare = f"{units.size(made['spare'])} to spare" if made["fits"] else f"no, by {units.size(-made['spare'])}"
        times = ["–"] * 4
        if made["fits"]:
            times = [units.seconds(floor["floor"]), step["bound"], f"{floor['mfu']:.0%}"]
            times.append(units.rate(floor["tokens_per_second"]))
        cells = [made["size"], made["topology"], made["mesh"], str(made["options"]["batch"])]
        cells.append(f"{units.size(made['peak'])} of {units.size(made['capacity'])} ({excess.over(made):.2f}×)")
        cells += [spare, *times, units.seconds(made["compile_seconds"]), f"`{row.command}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m optjax.sharding.plan.page", description=__doc__)
    default = Path(__file__).resolve().parents[1] / "PLANS.md"
    parser.add_argument("--to", type=Path, default=default, metavar="FILE", help=f"the page (default: {default})")
    parser.add_argument("--only", default="", metavar="TEXT", help="compile those alone whose command holds this text")
    parser.add_argument("--again", action="store_true", help="compile all rows again")
    arguments = parser.parse_args()
    file = arguments.to.with_suffix(".json")
    if arguments.again:
        file.unlink(missing_ok=True)
    make(Page(file, lambda command: arguments.only in command), arguments.to)


def make(page: Page, path: Path) -> None:
    """All rows, and the page of them; written anew after each size."""
    rows: dict[str, dict[str, Row]] = {job: {} for job in JOBS}
    found: dict[tuple[str, str, str], Row] = {}
    for size in SIZES:
        for job, options in JOBS.items():
            for chip in RENTED:
                for row in smallest(page, size, chip, job, options):
                    rows[job][row.command] = found[size, chip, job] = row
        for request in map(from_words, (line for line in ALSO.splitlines() if line.startswith(size + " "))):
            row = page.row(request)
            if row is not None:
                rows[request.job][row.command] = row
        write({job: list(these.values()) for job, these in rows.items()}, found, path)


if __name__ == "__main__":
    main()
