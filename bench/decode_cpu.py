"""optjax, transformers on torch, FlaxOPT and CTranslate2 on a CPU, in turn: how fast do they continue prompts?

    python -m bench.decode_cpu              # OPT-125m and OPT-350m shapes, batch 1 and 8: about ten minutes
    python -m bench.decode_cpu --quick      # OPT-125m's shape, two rounds
    python -m bench.decode_cpu --save       # also writes bench/results/decode_cpu.md
    python -m bench.decode_cpu --beams 4    # beam search; --save writes bench/results/decode_cpu_beams.md

All sides have the same random weights in float32, the same number of threads and cores, and make every token asked for,
greedily or by beam search. Each lives in a process of its own; in each round all are asked one after the other, first
for one token, then for all of them, so that what disturbs the machine disturbs them alike. The very first call, which
compiles, is reported apart. A figure is the median of the rounds; so is a ratio of times end to end, of each round's
ratio.

The limit is what memory allows a decoding step: the bytes of weights, and of keys and values at mid-way, at the speed
with which as many threads stream over an array of the weights' size, measured in the same rounds.

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
from bench.prepare import SIZES
from bench.worker import ROOT, Worker

NEEDS = {"optjax": "jax", "torch": "torch", "flax": "torch", "flax-jit": "torch", "ctranslate2": "ctranslate2"}
ONCE = ("flax",)  # compiles at every call: one round of it takes as long as several of the others
READS = 8
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
            prepare = [sys.executable, "-m", "bench.prepare", size, str(where), *formats]
            subprocess.run(prepare, check=True, cwd=ROOT, capture_output=not args.verbose)
            results += measure_size(size, where, sides, args)
    outcome = report.Outcome([asdict(r) | {"decoding": r.decoding(args.new)} for r in results], vars(args))
    report.show(outcome)
    print(f"{time.time() - start:.0f} s in all")
    if args.json:
        text = json.dumps(asdict(outcome), indent=1)
        Path(args.json).write_text(text) if args.json != "-" else print(text)
    if args.save:
        path = ROOT / "bench" / "results" / ("decode_cpu.md" if args.beams == 1 else "decode_cpu_beams.md")
        path.parent.mkdir(exist_ok=True)
        path.write_text(report.markdown(outcome))
        print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode_cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["125m", "350m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sides", nargs="+", choices=list(NEEDS), default=list(NEEDS))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to make; at least 2")
    parser.add_argument("--beams", type=int, default=1, help="of beam search (1: greedy)")
    parser.add_argument("--rounds", type=int, help="measured rounds; by default 3 at batch 1 and 2 above")
    parser.add_argument("--threads", type=int, default=2, help="threads, and cores, of every side")
    parser.add_argument("--quick", action="store_true", help="one size, two rounds")
    parser.add_argument("--json", metavar="FILE", help="also write every figure; - for the terminal")
    parser.add_argument("--save", action="store_true", help="also write bench/results/decode_cpu.md")
    parser.add_argument("--verbose", action="store_true", help="show what the conversion prints")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds = args.sizes[:1], args.rounds or 2
    if args.new < 2:
        parser.error("--new should be at least 2: the decoding speed is that of the tokens after the first")
    return args


def measure_size(size: str, folder: Path, sides: list[str], args: argparse.Namespace) -> list[Result]:
    with ExitStack() as stack:
        workers = {}
        for side in [*sides, "reader"]:
            workers[side] = stack.enter_context(closing(Worker(side, args.threads, folder / f"{side}.log")))
        loads = {side: worker.ask(load=str(folder)) for side, worker in workers.items()}
        results = []
        for batch in args.batches:
            row = {s: Result(size, batch, s, loads[s]["version"], loads[s]["peak"]) for s in sides}
            measure_batch(workers, row, folder, args)
            results += row.values()
        return results


def measure_batch(workers: dict[str, Worker], row: dict[str, Result], folder: Path, args: argparse.Namespace) -> None:
    """Fills the results of one size and batch: a first call of each side, then the rounds."""
    first = next(iter(row.values()))
    size, batch = first.size, first.batch
    config = SIZES[size]
    vocab = config.get("vocab_size", 50272)
    # Any ids do, as long as all sides get the same: a linear congruence spreads them well enough.
    ids = [[4 + (7919 * (args.prompt * b + t) + 13) % (vocab - 4) for t in range(args.prompt)] for b in range(batch)]
    tokens: dict[str, Any] = {}
    for side, result in row.items():
        _say(f"{size}, batch {batch}: first call of {side}")
        answer = workers[side].ask(ids=ids, new=args.new, beams=args.beams)
        result.first_call = answer["seconds"]
        workers[side].ask(ids=ids, new=1, beams=args.beams)
        tokens[side] = sum(answer["ids"], [])
        result.same_tokens = _share_equal(tokens[side], tokens[first.side])
        time.sleep(SETTLE_SECONDS)
    reads = []
    rounds = args.rounds or (3 if batch == 1 else 2)
    for number in range(rounds):
        _say(f"{size}, batch {batch}: round {number + 1} of {rounds}")
        for side, result in row.items():
            if number and side in ONCE:
                continue
            one = workers[side].ask(ids=ids, new=1, beams=args.beams, reset=not number)
            result.one_token.append(one["seconds"])
            answer = workers[side].ask(ids=ids, new=args.new, beams=args.beams)
            result.all_tokens.append(answer["seconds"])
            result.peak = answer["peak"]
            time.sleep(SETTLE_SECONDS)
        reads.append(workers["reader"].ask(ids=[[0]], new=READS)["seconds"] / READS)
    weights = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    middle = args.prompt + args.new / 2
    kept = 2 * 4 * batch * middle * config["hidden_size"] * config["num_hidden_layers"]
    for result in row.values():
        result.limit = batch / (min(reads) * (weights + kept) / weights)


def _share_equal(a: list[int], b: list[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def _installed(side: str) -> bool:
    wanted = {NEEDS[side]} | ({"transformers"} if side in ("torch", "flax", "flax-jit", "ctranslate2") else set())
    return all(importlib.util.find_spec(name) for name in wanted)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
