"""transformers with eager, SDPA and FlashAttention-2 attention, FlaxOPT, and optjax on a GPU: how fast is text made?

    python -m bench.decode_gpu --save       # OPT-350m and OPT-2.7b: bench/results/decode_gpu.md and its pictures
    python -m bench.decode_gpu --sizes 350m --batches 1 --lengths 512 --rounds 3
    python -m bench.decode_gpu --device cpu --sizes tiny --lengths 16 32 --batches 1 2 --new 4   # a dry run

It takes `pip install -e .[bench,cuda,plot]`, a torch that sees the GPU, and flash-attn, if that is to take part.
Nothing is downloaded: the weights are random, the same for all sides, and in half precision, in which all compute.

Each side lives in a process of its own, and all stay on the device, with all the memory that they have had so far: of
2.7b a side takes 5.4 GB for weights and, with 32 prompts of 1920, 21 GB for the cache. So 80 GB do not hold all sides
in the largest cells, and those that come last run out of memory; --in-turn gives the device to one after the other. In
each cell, small ones first, every side is called until it compiles nothing more; then in each round all are asked one
after the other, first for one token (the prompt is read: prefill), then for all of them. Figures are medians of the
rounds, and ratios medians of each round's ratio. A side that fails is shown as such, and the others go on.

Peak is what a side had of the device's memory at most: torch's allocator in this cell, jax's in all cells so far.
FlaxOPT is inside a `jax.jit` of the caller's, as by itself it compiles at every call. In half precision sides round
differently, and a token that differs changes all after it: the share of equal ones is shown. Where not even half of the
first tokens of a size are equal something is wrong, and the program ends with an error, after its tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench import gpu
from bench.arguments import Parser
from bench.prepare import SIZES
from bench.sides import GPU_SIDES
from bench.worker import ROOT, Worker

NAMES = {
    "torch-eager": "transformers, eager",
    "torch-sdpa": "transformers, SDPA",
    "torch-flash": "transformers, FlashAttention-2",
    "flax-gpu": "FlaxOPT in a jax.jit",
    "optjax-gpu-eager": "optjax without its kernels",
    "optjax-gpu": "optjax",
}
OURS = "optjax-gpu"
COLUMNS = (
    "batch, prompt", "", "prefill, ms", "optjax: prefill", "decoding, tokens/s", "optjax: decoding", "peak, GB",
    "same first token", "same tokens",
)  # fmt: skip


@dataclass
class Result:
    """One side in one cell; lists have an entry a round, in seconds."""

    size: str
    batch: int
    length: int
    side: str
    new: int
    failed: str = ""
    one_token: list[float] = field(default_factory=list)
    all_tokens: list[float] = field(default_factory=list)
    peak: int = 0
    same_first: float = 1.0
    same_tokens: float = 1.0

    @property
    def rests(self) -> list[float]:
        """Seconds of the tokens after the first, by round; not above 0 where noise is larger than that."""
        return [b - a for a, b in zip(self.one_token, self.all_tokens, strict=True)]

    @property
    def decoding(self) -> str:
        """Tokens/s after the first one."""
        seconds = median(self.rests)
        return f"{self.batch * (self.new - 1) / seconds:,.0f}" if seconds > 0 else "–"


def main() -> None:
    parser, args = parse()
    device = gpu.name_of_device(parser, args.device)
    sides = gpu.present(NAMES, args.sides, args.device)
    if not sides:
        parser.error("no side is left to measure")
    results: list[Result] = []
    versions: dict[str, str] = {}
    try:
        for size in args.sizes:
            with tempfile.TemporaryDirectory(prefix="optjax-bench-") as folder:
                measure_size(size, Path(folder), sides, args, versions, results)
    finally:  # what was measured is shown, whatever came then
        results.sort(key=lambda r: (args.sizes.index(r.size), r.batch, r.length, sides.index(r.side)))
        lines = markdown(results, gpu.setting(device, versions, args.dtype, args.rounds), args)
        gpu.publish("decode_gpu", lines, results, partial(draw, device=device), args.sizes, args)
    check_first_tokens(results)
    sys.exit(gpu.status(results))


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser("decode_gpu", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["350m", "2.7b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 1024, 1920], help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to make; at least 2")
    gpu.add_options(parser, list(GPU_SIDES), ("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    gpu.check_options(parser, args)
    if args.new < 2 or max(args.lengths) + args.new > 2048:
        parser.error(f"--new should be at least 2, and with the longest prompt at most 2048 tokens, not {args.new}")
    return parser, args


def measure_size(
    size: str,
    folder: Path,
    sides: list[str],
    args: argparse.Namespace,
    versions: dict[str, str],
    results: list[Result],
) -> None:
    """Adds the results of a size as they come."""
    gpu.say(f"{size}: writing a random model")
    formats = ["flax"] if "flax-gpu" in sides else []
    prepare = [sys.executable, "-m", "bench.prepare", size, str(folder), *formats, "--dtype", args.dtype]
    done = subprocess.run(prepare, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no model of {size} could be written: {done.stderr[-2000:]}")
    options = {"device": args.device, "dtype": args.dtype, "threads": args.threads}
    cells = [(batch, length) for batch in args.batches for length in args.lengths]
    cells.sort(key=lambda cell: (cell[0] * cell[1], cell))
    tokens: dict[tuple[int, int], dict[str, list[list[int]]]] = {cell: {} for cell in cells}
    for group in [[side] for side in sides] if args.in_turn else [sides]:
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            failed = dict.fromkeys(group, "")
            for side in group:
                gpu.say(f"{size}: loading {NAMES[side]}")
                workers[side] = stack.enter_context(closing(Worker(side, options, folder / f"{side}.log")))
                try:
                    versions[NAMES[side]] = workers[side].ask(load=str(folder))["version"]
                except RuntimeError as error:
                    failed[side] = gpu.failure(error)
            for cell in cells:
                row = {side: Result(size, *cell, side, args.new, failed[side]) for side in group}
                measure(workers, row, prompts(size, *cell), tokens[cell], args)
                results += row.values()
                compare({r.side: r for r in results if (r.size, r.batch, r.length) == (size, *cell)}, tokens[cell])
                gpu.keep(results, args)


def prompts(size: str, batch: int, length: int) -> list[list[int]]:
    """Any ids do, as long as all sides get the same: a linear congruence spreads them well enough."""
    vocab = SIZES[size].get("vocab_size", 50272)
    return [[4 + (7919 * (length * b + t) + 13) % (vocab - 4) for t in range(length)] for b in range(batch)]


def measure(
    workers: dict[str, Worker],
    row: dict[str, Result],
    ids: list[list[int]],
    tokens: dict[str, list[list[int]]],
    args: argparse.Namespace,
) -> None:
    """Fills the results and the tokens of one cell: first calls, which compile, then the rounds."""
    first = next(iter(row.values()))
    where = f"{first.size}, batch {first.batch}, prompts of {first.length}"

    def ask(side: str, new: int, **more: Any) -> dict[str, Any] | None:
        if row[side].failed:
            return None
        try:
            return workers[side].ask(ids=ids, new=new, **more)
        except RuntimeError as error:
            row[side].failed = gpu.failure(error)
            return None

    for side in row:
        gpu.say(f"{where}: first calls of {NAMES[side]}")
        for new in (1, args.new, args.new):
            answer = ask(side, new, reset=True)
            if answer is not None:
                tokens[side] = answer["ids"]
    for number in range(args.rounds):
        gpu.say(f"{where}: round {number + 1} of {args.rounds}")
        for side, result in row.items():
            one, every = ask(side, 1), ask(side, args.new)
            if one is not None and every is not None:
                result.one_token.append(one["seconds"])
                result.all_tokens.append(every["seconds"])
                result.peak = every["peak"]


def compare(row: dict[str, Result], tokens: dict[str, list[list[int]]]) -> None:
    """How many tokens of each side are those of the first one."""
    done = [side for side in row if not row[side].failed]
    for side in done:
        pairs = [list(zip(own, other, strict=True)) for own, other in zip(tokens[side], tokens[done[0]], strict=True)]
        row[side].same_first = sum(a == b for (a, b), *_ in pairs) / len(pairs)
        row[side].same_tokens = sum(a == b for pair in pairs for a, b in pair) / sum(map(len, pairs))


def check_first_tokens(results: list[Result]) -> None:
    """Of all prompts of a size together: of a single one rounding alone may choose another first token.

    Raises:
      RuntimeError: not even half of a side's first tokens are those of the first side.
    """
    for size, side in dict.fromkeys((r.size, r.side) for r in results if not r.failed):
        own = [r for r in results if (r.size, r.side) == (size, side) and not r.failed]
        share = sum(r.same_first * r.batch for r in own) / sum(r.batch for r in own)
        if share < 0.5:
            raise RuntimeError(f"of {size} {NAMES[side]} makes {share:.0%} of the first side's first tokens only")


def markdown(results: list[Result], setting: str, args: argparse.Namespace) -> list[str]:
    named = ("sizes", "batches", "lengths", "sides", "new", "dtype", "rounds", "device", "in_turn")
    lines = ["# Decoding on a GPU", "", gpu.command("bench.decode_gpu", args, named), "", setting, ""]
    lines.append(
        f"{args.new} new tokens after each prompt. *optjax*: how many times as fast optjax is. *Same*: as the first "
        "side's. The rest is explained in [bench/decode_gpu.py](../decode_gpu.py)."
    )
    for size, group in groupby(results, key=lambda r: r.size):
        found = list(group)
        lines += ["", f"## OPT-{size}", "", f"![Speed-up over {NAMES[found[0].side]}](decode_gpu_{size}.png)", ""]
        cells: dict[tuple[int, int], list[Result]] = {}
        for r in found:
            cells.setdefault((r.batch, r.length), []).append(r)
        lines += gpu.table(COLUMNS, [_cells(r, row) for row in cells.values() for r in row], left=2)
    return lines


def _cells(r: Result, row: list[Result]) -> list[str]:
    title = f"{r.batch}, {r.length}" if r is row[0] else ""
    if r.failed:
        return [title, NAMES[r.side], r.failed, *[""] * (len(COLUMNS) - 3)]
    ours = next((other for other in row if other.side == OURS and not other.failed), None)
    ratios = ["", ""]
    if ours is not None and ours is not r:
        pairs = (r.one_token, ours.one_token), (r.rests, ours.rests)
        ratios = [gpu.times(gpu.ratio(slow, quick)) for slow, quick in pairs]
    speeds = [f"{1e3 * median(r.one_token):.1f}", ratios[0], r.decoding, ratios[1]]
    return [title, NAMES[r.side], *speeds, f"{r.peak / 1e9:.2f}", f"{r.same_first:.0%}", f"{r.same_tokens:.0%}"]


def draw(path: Path, results: list[Result], device: str) -> None:
    """Speed-ups over the first side, by length: a column for each batch, prefill above decoding."""
    sides = list(dict.fromkeys(r.side for r in results))
    batches = sorted({r.batch for r in results})
    panels: gpu.Panels = {}
    for part, times in (("prefill", "one_token"), ("decoding", "rests")):
        for batch in batches:
            lines: dict[str, list[tuple[float, float]]] = {NAMES[side]: [] for side in sides[1:]}
            base = {r.length: r for r in results if (r.batch, r.side) == (batch, sides[0]) and not r.failed}
            for r in results:
                if r.batch == batch and r.side != sides[0] and not r.failed and r.length in base:
                    speedup = gpu.ratio(getattr(base[r.length], times), getattr(r, times))
                    lines[NAMES[r.side]].append((r.length, speedup))
            panels[f"{part}, batch {batch}"] = lines
    title = f"OPT-{results[0].size} beside {NAMES[sides[0]]}\n{device}"
    gpu.draw(path, panels, "tokens of the prompt", title, columns=len(batches))


if __name__ == "__main__":
    main()
