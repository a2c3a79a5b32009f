"""optjax, transformers on torch, FlaxOPT and CTranslate2 on a CPU, in turn: how fast do they continue prompts?

    python -m bench.decode_cpu              # OPT-125m and OPT-350m shapes, batch 1 and 8: about ten minutes
    python -m bench.decode_cpu --quick      # OPT-125m's shape, two rounds
    python -m bench.decode_cpu --save       # also writes bench/results/decode_cpu.md
    python -m bench.decode_cpu --beams 4    # beam search; --save writes bench/results/decode_cpu_beams.md
    python -m bench.decode_cpu --guess lookup     # tokens guessed by prompt lookup, or by an `assistant`; batch 1
    python -m bench.decode_cpu --int8             # weights in int8, beside float32's
    python -m bench.decode_cpu --sizes 1.3b --in-turn --sides optjax torch ctranslate2   # 11 GB of memory and of disk

All sides have the same random weights in float32, the same number of threads and cores, and make every token asked for,
greedily or by beam search. Each lives in a process of its own; in each round all are asked one after the other, first
for one token, then for all of them, so that what disturbs the machine disturbs them alike. The very first call, which
compiles, is reported apart. A figure is the median of the rounds; so is a ratio of times end to end, of each round's
ratio. With --in-turn a side's process ends before the next one starts, for sizes of which memory holds one at a time;
then only the figures are compared, not the rounds.

Guessing is shown at its best: the model says one token over and over, so that every guess is right, and the assistant,
a model of two thin layers, says the same. transformers guesses for one row only. Contrastive search has no side to
stand beside: transformers 4.57 has it no more, and CTranslate2 never had.

The limit is what memory allows a decoding step: the bytes of weights (in int8 a quarter), and of keys and values at
mid-way, those of a prompt once and of new tokens for each beam, at the speed with which as many threads stream over an
array of the weights' size, measured in the same rounds.
Guesses can pass it: a step is then worth several tokens.

Sides whose library is not installed are left out. `pip install -e .[bench]` has them all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import report
from bench.arguments import Parser
from bench.prepare import SIZES
from bench.worker import ROOT, Worker

NEEDS = {"optjax": "jax", "torch": "torch", "flax": "torch", "flax-jit": "torch", "ctranslate2": "ctranslate2"}
INT8 = {"optjax-int8": "jax", "ctranslate2-int8": "ctranslate2", "optjax": "jax", "ctranslate2": "ctranslate2"}
ONCE = ("flax",)  # compiles at every call: one round of it takes as long as several of the others
READS = 8
# What a side's process needs at most, as a multiple of the weights: alone, and of many, whose peaks do not meet.
ALONE, TOGETHER = {"flax": 5.0, "flax-jit": 4.5}, {"flax": 4.0, "flax-jit": 4.0}
OTHERS = 2.0
SETTLE_SECONDS = 0.3  # OpenMP's threads spin for a while after their work


@dataclass
class Result:
    """One side at one size and batch; lists have an entry a round, in seconds."""

    size: str
    batch: int
    side: str
    version: str
    load_peak: int
    first_call: float = 0.0
    one_token: list[float] = field(default_factory=list)
    all_tokens: list[float] = field(default_factory=list)
    peak: int = 0
    same_tokens: float = 1.0
    limit: float = 0.0  # decoding, tokens/s that memory allows

    def decoding(self, new: int) -> float:
        """Tokens/s after the first one; infinite where noise is larger than what is measured."""
        seconds = median(self.all_tokens) - median(self.one_token)
        return self.batch * (new - 1) / seconds if seconds > 0 else float("inf")


def main() -> None:
    args = parse()
    sides = [side for side in args.sides if _installed(side)]
    left_out = [side for side in args.sides if side not in sides]
    if left_out:
        print(f"left out, not installed: {', '.join(left_out)}", file=sys.stderr)
    start = time.time()
    results: list[Result] = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(prefix="optjax-bench-") as folder:
            _say(f"{size}: writing a random model for {', '.join(sides)}")
            where = Path(folder)
            formats = [f for f in ("flax", "ctranslate2") if any(side.startswith(f) for side in sides)]
            formats += ["assistant"] if args.guess == "assistant" else []
            prepare = [sys.executable, "-m", "bench.prepare", size, str(where), *formats]
            prepare += [] if args.guess == "none" else ["--repeats"]
            subprocess.run(prepare, check=True, cwd=ROOT, capture_output=not args.verbose)
            check_memory(where, sides, args.in_turn)
            results += measure_size(size, where, sides, args)
    outcome = report.Outcome([asdict(r) | {"decoding": r.decoding(args.new)} for r in results], vars(args))
    report.show(outcome)
    print(f"{time.time() - start:.0f} s in all")
    if args.json:
        text = json.dumps(asdict(outcome), indent=1)
        Path(args.json).write_text(text) if args.json != "-" else print(text)
    if args.save:
        path = ROOT / "bench" / "results" / f"decode_cpu{suffix(args)}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(report.markdown(outcome))
        print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = Parser("decode_cpu", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["125m", "350m"])
    parser.add_argument("--batches", nargs="+", type=int, help="by default 1 and 8; 1 with --guess")
    parser.add_argument("--sides", nargs="+", choices=list(NEEDS | INT8), help="by default all that do what is asked")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to make; at least 2")
    parser.add_argument("--beams", type=int, default=1, help="of beam search; 1 is greedy")
    parser.add_argument("--guess", choices=("none", "lookup", "assistant"), default="none", help="tokens ahead")
    parser.add_argument("--int8", action="store_true", help="weights in int8 as well")
    parser.add_argument("--in-turn", action="store_true", help="one side's process at a time")
    parser.add_argument("--rounds", type=int, help="measured rounds; by default 3 at batch 1 and 2 above")
    parser.add_argument("--threads", type=int, default=2, help="threads, and cores, of every side")
    parser.add_argument("--quick", action="store_true", help="one size, two rounds")
    parser.add_argument("--json", metavar="FILE", help="also write every figure; - for the terminal")
    parser.add_argument("--save", action="store_true", help="also write bench/results/decode_cpu….md")
    parser.add_argument("--verbose", action="store_true", help="show what the conversion prints")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds = args.sizes[:1], args.rounds or 2
    if args.new < 2:
        parser.error("--new should be at least 2: the decoding speed is that of the tokens after the first")
    if args.guess != "none" and (args.beams > 1 or args.int8):
        parser.error("--guess is for greedy decoding in float32; leave --beams and --int8 out")
    args.batches = args.batches or ([1] if args.guess != "none" else [1, 8])
    args.sides = args.sides or (["optjax", "torch"] if args.guess != "none" else list(INT8 if args.int8 else NEEDS))
    args.how = {"beams": args.beams, "guess": args.guess}
    return args


def suffix(args: argparse.Namespace) -> str:
    """What tells the results of one strategy from those of another."""
    named = {"_beams": args.beams > 1, f"_{args.guess}": args.guess != "none", "_int8": args.int8}
    return "".join(name for name, given in named.items() if given) + ("_large" if args.in_turn else "")


def check_memory(folder: Path, sides: list[str], in_turn: bool) -> None:
    """Ends the program where all sides, or one of them, would not fit: a machine that swaps measures its disk."""
    each = [(ALONE if in_turn else TOGETHER).get(side, OTHERS) for side in sides]
    needed = _weights(folder) * (max(each) if in_turn else sum(each) + 1)
    free = report.available_memory()
    if needed > free:
        advice = "use a larger machine or fewer --sides" if in_turn else "try --in-turn, or fewer --sides"
        sys.exit(f"about {needed / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB are free; {advice}")


def measure_size(size: str, folder: Path, sides: list[str], args: argparse.Namespace) -> list[Result]:
    cells = {batch: Cell(size, batch, args) for batch in args.batches}
    # The reader last: a side must not meet its array where one at a time is all that memory holds.
    groups = [[side] for side in (*sides, "reader")] if args.in_turn else [[*sides, "reader"]]
    for group in groups:
        with ExitStack() as stack:
            workers = {}
            for side in group:
                worker = Worker(side, {"threads": args.threads}, folder / f"{side}.log")
                workers[side] = stack.enter_context(closing(worker))
            loads = {side: worker.ask(load=str(folder)) for side, worker in workers.items()}
            for cell in cells.values():
                new = {s: Result(size, cell.batch, s, loads[s]["version"], loads[s]["peak"]) for s in group}
                new.pop("reader", None)
                measure(workers, new, cell, args)
    weights = _weights(folder)
    for cell in cells.values():
        for side, result in cell.results.items():
            its_weights = weights / 4 if side.endswith("int8") else weights
            result.limit = cell.batch / (min(cell.reads) * (its_weights + cell.kept_bytes) / weights)
    return [result for cell in cells.values() for result in cell.results.values()]


class Cell:
    """One size and batch: what all sides are asked, and what they answered."""

    def __init__(self, size: str, batch: int, args: argparse.Namespace):
        self.size, self.batch = size, batch
        config = SIZES[size]
        vocab = config.get("vocab_size", 50272)
        # Any ids do, as long as all sides get the same: a linear congruence spreads them well enough.
        self.ids = [
            [4 + (7919 * (args.prompt * b + t) + 13) % (vocab - 4) for t in range(args.prompt)] for b in range(batch)
        ]
        middle = args.prompt + args.beams * args.new / 2
        self.kept_bytes = 2 * 4 * batch * middle * config["hidden_size"] * config["num_hidden_layers"]
        self.results: dict[str, Result] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reads: list[float] = []


def measure(workers: dict[str, Worker], new: dict[str, Result], cell: Cell, args: argparse.Namespace) -> None:
    """Fills the results of these sides in one cell: a first call of each, then the rounds."""
    what: dict[str, Any] = {"ids": cell.ids, "how": args.how}
    cell.results |= new
    for side, result in new.items():
        _say(f"{cell.size}, batch {cell.batch}: first call of {side}")
        answer = workers[side].ask(**what, new=args.new)
        result.first_call = answer["seconds"]
        workers[side].ask(**what, new=1)
        cell.tokens[side] = sum(answer["ids"], [])
        result.same_tokens = _share_equal(cell.tokens[side], next(iter(cell.tokens.values())))
        time.sleep(SETTLE_SECONDS)
    rounds = args.rounds or (3 if cell.batch == 1 else 2)
    for number in range(rounds):
        _say(f"{cell.size}, batch {cell.batch}: round {number + 1} of {rounds}")
        for side, result in new.items():
            if number and side in ONCE:
                continue
            one = workers[side].ask(**what, new=1, reset=not number)
            result.one_token.append(one["seconds"])
            answer = workers[side].ask(**what, new=args.new)
            result.all_tokens.append(answer["seconds"])
            result.peak = answer["peak"]
            time.sleep(SETTLE_SECONDS)
        if "reader" in workers:
            cell.reads.append(workers["reader"].ask(ids=[[0]], new=READS)["seconds"] / READS)


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))


def _share_equal(a: list[int], b: list[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def _installed(side: str) -> bool:
    wanted = {(NEEDS | INT8)[side]} | (set() if side.startswith("optjax") else {"transformers"})
    return all(importlib.util.find_spec(name) for name in wanted)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
