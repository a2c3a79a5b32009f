"""Tokenizing and packing beside `tokenizers` alone, and how long a train step waits for its batch.

  python -m bench.pack_cpu corpus.jsonl [--tokenizer opt-mini] [--rounds 5] [--waits]

Each round runs, in fresh processes and in turn, with the same cores: `encode_batch` of `tokenizers` over all documents
in memory, in as many threads as there are cores, timed without reading the file or loading anything; and the whole of
`python -m optjax.train.pack`, from its start to its end. Medians of both, and of their ratio per round.

With --waits: batches of the packed text are taken one after another, each after a pause in which a step would run, and
how long `next` takes is printed, the first batch apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import Parser

ROOT = Path(__file__).resolve().parents[1]


def tokenize_alone(documents: Path, tokenizer: str) -> None:
    """Prints the seconds that `encode_batch` takes."""
    import optjax

    backend = optjax.Tokenizer.load(tokenizer).backend
    with open(documents, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].strip() for line in lines]
    start = time.perf_counter()
    backend.encode_batch(texts, add_special_tokens=False)
    print(time.perf_counter() - start)


def seconds_alone(args: argparse.Namespace) -> float:
    program = [sys.executable, "-m", "bench.pack_cpu", str(args.documents), "--tokenizer", args.tokenizer, "--alone"]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "JAX_PLATFORMS": "cpu"}
    return float(subprocess.run(program, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)


def seconds_packing(args: argparse.Namespace, out: Path) -> float:
    program = [sys.executable, "-m", "optjax.train.pack", "--documents", str(args.documents), "--quiet"]
    program += ["--tokenizer", args.tokenizer, "--out", str(out)]
    start = time.perf_counter()
    subprocess.run(program, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def waits(folder: Path, pause: float, batches: int) -> None:
    from optjax.train.data import open_text

    print(f"\nmilliseconds that next(loader) takes, length 2048, {pause * 1e3:.0f} ms after the one before")
    print("batch  boundaries   first  median     max")
    for batch_size in (8, 16, 32, 64):
        for boundaries in (False, True):
            how: dict[str, Any] = dict(length=2048, batch_size=batch_size, seed=0, boundaries=boundaries)
            with open_text(folder, vocab_size=1 << 16, **how) as loader:
                taken = []
                for _ in range(batches + 1):
                    start = time.perf_counter()
                    next(loader)
                    taken.append(1e3 * (time.perf_counter() - start))
                    time.sleep(pause)
            first, *rest = taken
            print(f"{batch_size:5d}  {boundaries!s:10s} {first:7.2f} {median(rest):7.2f} {max(rest):7.2f}")


def main() -> None:
    parser = Parser("pack_cpu", __doc__)
    parser.add_argument("documents", type=Path, help=".jsonl, the text under text; 20 MB and more")
    parser.add_argument("--tokenizer", default="opt-mini", help="folder, hub id or opt-mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waits", action="store_true", help="the loader as well")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of a step")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        tokenize_alone(args.documents, args.tokenizer)
        return
    size = args.documents.stat().st_size / 1e6
    with tempfile.TemporaryDirectory() as folder:
        alone, packing = [], []
        for number in range(args.rounds):
            alone.append(seconds_alone(args))
            packing.append(seconds_packing(args, Path(folder) / str(number)))
            print(f"round {number + 1}: encode_batch {alone[-1]:.1f} s, packing {packing[-1]:.1f} s", flush=True)
        if args.rounds:
            ratio = median(a / b for a, b in zip(alone, packing, strict=True))
            cores = len(os.sched_getaffinity(0))
            print(f"{size:.0f} MB of {args.documents.name}, {cores} cores, medians of {args.rounds} rounds:")
            print(f"encode_batch alone {size / median(alone):6.2f} MB/s")
            print(f"optjax.train.pack  {size / median(packing):6.2f} MB/s, {ratio:.0%} of it")
        if args.waits:
            if not args.rounds:
                seconds_packing(args, Path(folder) / "0")
            waits(Path(folder) / "0", args.pause, 100)


if __name__ == "__main__":
    main()
