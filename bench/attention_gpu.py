"""Attention alone on a GPU: transformers' eager, SDPA and FlashAttention-2, cuDNN's, and optjax's, by sequence length.

    python -m bench.attention_gpu --save    # heads of OPT-350m and OPT-2.7b: bench/results/attention_gpu.md, pictures
    python -m bench.attention_gpu --shapes 350m --lengths 2048 --parts forward
    python -m bench.attention_gpu --device cpu --dtype float32 --lengths 16 32 --tokens 64    # a dry run

It takes what `bench.decode_gpu` takes. A batch has as many rows as make --tokens in all, one at least. Each side gets
the same random queries, keys and values in half precision, in a process of its own and in the layout that its library
uses; in each round all are asked in turn for --calls calls, and the figure is the median of the rounds, of one call.
A side keeps the device's memory that it has had: eager attention's scores of 16384 tokens are tens of GB, after which
others may run out of it. With --in-turn each side has the device to itself.
FLOP/s count what causal attention needs, 2·B·H·K·T² forward and 2.5 times as many backward. The largest difference is
that of the output, or of the gradients, from the first side's, as a share of its largest element; half precision allows
about 0.01, and a side where it is above 0.1 has failed. A side that fails is shown as such, and the others go on.

Peak is memory beside queries, keys and values: of torch what its allocator says, of jax what the compiled program
needs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median

import numpy as np

from bench import gpu
from bench.arguments import Parser
from bench.attentions import JAX, NAMES, TORCH
from bench.prepare import SIZES
from bench.worker import Worker

COLUMNS = ("part", "length", "", "ms", "speed-up", "TFLOP/s", "peak, MB", "largest difference")
PARTS = ("forward", "forward and backward")
TOLERANCE = 0.1


@dataclass
class Result:
    """One side in one cell; ``seconds`` of one call, by round."""

    size: str
    part: str
    batch: int
    length: int
    side: str
    failed: str = ""
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    difference: float = 0.0


def main() -> None:
    parser, args = parse()
    device = gpu.name_of_device(parser, args.device)
    sides = gpu.present(NAMES, args.sides, args.device)
    if not sides:
        parser.error("no side is left to measure")
    results: list[Result] = []
    versions: dict[str, str] = {}
    options = {"device": args.device, "dtype": args.dtype, "threads": args.threads}
    cells = [(size, part, length) for size in args.shapes for part in args.parts for length in sorted(args.lengths)]
    samples: dict[tuple[str, str, int], list[float]] = {}
    try:
        for group in [[side] for side in sides] if args.in_turn else [sides]:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optjax-bench-")))
                workers: dict[str, Worker] = {}
                failed = dict.fromkeys(group, "")
                for side in group:
                    worker = Worker(f"attention:{side}", options, folder / f"{side}.log")
                    workers[side] = stack.enter_context(closing(worker))
                    try:
                        versions[NAMES[side]] = worker.ask(load="")["version"]
                    except RuntimeError as error:
                        failed[side] = gpu.failure(error)
                for cell in cells:
                    results += measure(workers, failed, cell, samples, args)
                    gpu.keep(results, args)
    finally:  # what was measured is shown, whatever came then
        results.sort(key=lambda r: (cells.index((r.size, r.part, r.length)), sides.index(r.side)))
        lines = markdown(results, gpu.setting(device, versions, args.dtype, args.rounds), args)
        gpu.publish("attention_gpu", lines, results, partial(draw, device=device), args.shapes, args)
    sys.exit(gpu.status(results))


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser("attention_gpu", __doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SIZES), default=["350m", "2.7b"], help="the model whose heads they are")
    add("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192, 16384])
    add("--tokens", type=int, default=16384, help="of a batch")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--calls", type=int, default=10, help="in a round")
    gpu.add_options(parser, [*TORCH, *JAX], ("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    gpu.check_options(parser, args)
    return parser, args


def measure(
    workers: dict[str, Worker],
    failed: dict[str, str],
    cell: tuple[str, str, int],
    samples: dict[tuple[str, str, int], list[float]],
    args: argparse.Namespace,
) -> list[Result]:
    size, part, length = cell
    batch = max(1, args.tokens // length)
    heads = SIZES[size]["num_attention_heads"]
    shape = [batch, length, heads, SIZES[size]["hidden_size"] // heads]
    row = {side: Result(size, part, batch, length, side, failed[side]) for side in workers}
    where = f"{size}, {part}, {batch} of {length}"
    for number in range(args.rounds + 1):  # the first compiles, and is compared
        gpu.say(f"{where}: round {number} of {args.rounds}" if number else f"{where}: first calls")
        for side, result in row.items():
            if result.failed:
                continue
            try:
                # Of a new shape first, which forgets those before.
                answer = workers[side].ask(shape=shape, backward=part != "forward", calls=args.calls, first=not number)
            except RuntimeError as error:
                result.failed = gpu.failure(error)
                continue
            if number:
                result.seconds.append(answer["seconds"])
                continue
            result.peak = answer["peak"]
            result.difference = difference(answer["sample"], samples.setdefault(cell, answer["sample"]))
            if not result.difference <= TOLERANCE:
                result.failed = f"failed: differs from the first side by {result.difference:.2g}"
    return list(row.values())


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest, as a share of the largest element; NaN where there is one among them."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(a - b).max() / np.abs(b).max())


def flops(r: Result) -> float:
    d = SIZES[r.size]["hidden_size"]
    return 2 * r.batch * d * r.length**2 * (1 if r.part == "forward" else 3.5)


def markdown(results: list[Result], setting: str, args: argparse.Namespace) -> list[str]:
    named = ("shapes", "lengths", "tokens", "sides", "dtype", "rounds", "calls", "device", "in_turn")
    lines = ["# Attention on a GPU", "", gpu.command("bench.attention_gpu", args, named), "", setting, ""]
    lines.append("*Speed-up*: over the first side. All is explained in [bench/attention_gpu.py](../attention_gpu.py).")
    for size, group in groupby(results, key=lambda r: r.size):
        found = list(group)
        heads = SIZES[size]["num_attention_heads"]
        title = f"OPT-{size}: {heads} heads of {SIZES[size]['hidden_size'] // heads}"
        picture = f"![Speed-up over {NAMES[found[0].side]}](attention_gpu_{size}.png)"
        lines += ["", f"## {title}", "", picture, ""]
        lines += gpu.table(COLUMNS, [_cells(r, _base(r, found)) for r in found], left=3)
    return lines


def _base(r: Result, results: list[Result]) -> Result:
    """The first side in the same cell."""
    return next(other for other in results if (other.part, other.length) == (r.part, r.length))


def _cells(r: Result, base: Result) -> list[str]:
    titles = [r.part, f"{r.batch} of {r.length}"] if r is base else ["", ""]
    if r.failed:
        return [*titles, NAMES[r.side], r.failed, *[""] * (len(COLUMNS) - 4)]
    speedup = "" if r is base or base.failed else gpu.times(gpu.ratio(base.seconds, r.seconds))
    seconds = median(r.seconds)
    speed = f"{flops(r) / seconds / 1e12:.3g}"
    return [
        *titles,
        NAMES[r.side],
        f"{1e3 * seconds:.3g}",
        speedup,
        speed,
        f"{r.peak / 1e6:,.0f}",
        f"{r.difference:.1e}",
    ]


def draw(path: Path, results: list[Result], device: str) -> None:
    """Speed-ups over the first side, by length."""
    sides = list(dict.fromkeys(r.side for r in results))
    panels: gpu.Panels = {}
    for part in dict.fromkeys(r.part for r in results):
        panels[part] = {NAMES[side]: [] for side in sides[1:]}
        for r in results:
            base = _base(r, results)
            if r.part == part and r.side != sides[0] and not r.failed and not base.failed:
                panels[part][NAMES[r.side]].append((r.length, gpu.ratio(base.seconds, r.seconds)))
    title = f"Attention of OPT-{results[0].size} beside {NAMES[sides[0]]}\n{device}"
    gpu.draw(path, panels, "tokens of a row", title, columns=2)


if __name__ == "__main__":
    main()
