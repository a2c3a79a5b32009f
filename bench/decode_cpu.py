"""Generation on the CPU: optjax, transformers' torch and Flax models, and CTranslate2, asked in turn.

    python -m bench.decode_cpu --save bench/results/decode_cpu.md      # needs pip install ctranslate2

OPT shapes with random weights in float32, greedy, all tokens made. Each side lives in a process of its own, and every
round asks all of them, so that they share the machine's moods; figures are medians of the rounds, ratios are medians of
the rounds' own ratios. "first token" is a generate of 1 token, "decode" the rest of a whole one, "end to end" a whole
one after the first, which compiles. The limit is what reading the weights once a token would allow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.prepare import SIZES
from bench.worker import Worker

FORMATS = {"flax": "flax", "flax-jit": "flax", "ctranslate2": "ctranslate2"}
DEFAULT_SIDES = ("optjax", "torch", "flax", "ctranslate2", "reader")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["125m", "350m"], choices=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--sides", nargs="+", default=list(DEFAULT_SIDES), help=f"of {', '.join(DEFAULT_SIDES)}, flax-jit"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens (128)")
    parser.add_argument("--new", type=int, default=64, help="tokens to make (64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures of all rounds")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the tables as Markdown")
    args = parser.parse_args(argv)
    if args.sides[0] != "optjax":
        parser.error("--sides should begin with optjax, which the others are compared with")

    cases = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            formats = sorted({FORMATS[side] for side in args.sides if side in FORMATS})
            subprocess.run([sys.executable, "-m", "bench.prepare", size, folder, *formats], check=True)
            cases += measure(size, folder, args)
    text = report(cases, args)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(cases, indent=1) + "\n")
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(text)


def measure(size: str, folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One case for each batch size: each side's figures, round by round."""
    from rich.progress import track

    workers = {side: Worker(side, args.threads) for side in args.sides}
    cases = []
    try:
        loads = {side: worker.ask(load=folder) for side, worker in workers.items()}
        for batch in args.batch:
            request = dict(batch=batch, prompt=args.prompt, vocab=SIZES[size].get("vocab_size", 50272))
            sides: dict[str, dict[str, Any]] = {
                side: {"version": load["version"], "first": [], "whole": []} for side, load in loads.items()
            }
            for side, worker in workers.items():
                worker.ask(reset=True)
                worker.ask(**request, new=1)
                answer = worker.ask(**request, new=args.new)
                sides[side] |= {"first_call": answer["seconds"], "ids": answer["ids"]}
            for _ in track(range(args.rounds), f"{size}, batch {batch}"):
                for side, worker in workers.items():
                    sides[side]["first"].append(worker.ask(**request, new=1)["seconds"])
                    answer = worker.ask(**request, new=args.new)
                    sides[side]["whole"].append(answer["seconds"])
                    sides[side]["peak"] = answer["peak"]
            ours = sides["optjax"]["ids"]
            for figures in sides.values():
                figures["same_ids"] = figures.pop("ids") == ours
            cases.append({"size": size, "batch": batch, "sides": sides})
    finally:
        for worker in workers.values():
            worker.close()
    return cases


def decode_seconds(figures: dict[str, Any]) -> list[float]:
    """Of the tokens after the first, round by round."""
    return [whole - first for whole, first in zip(figures["whole"], figures["first"], strict=True)]


def ratio(others: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))


def report(cases: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = ["# Generation on the CPU", ""]
    lines.append(
        f"Prompt {args.prompt}, {args.new} new tokens, float32, greedy, {args.threads} threads, medians of "
        f"{args.rounds} rounds. “×” is the other's time over optjax's: above 1, optjax is faster."
    )
    for case in cases:
        ours = case["sides"]["optjax"]
        reader = case["sides"].get("reader")
        lines += ["", f"## OPT-{case['size']}, batch {case['batch']}", ""]
        lines.append("| | first token | decode tokens/s | × | end to end | × | first call | peak memory | same ids |")
        lines.append("|-|-|-|-|-|-|-|-|-|")
        for side, figures in case["sides"].items():
            if side == "reader":
                continue
            decode = decode_seconds(figures)
            speed = case["batch"] * (args.new - 1) / statistics.median(decode)
            lines.append(
                f"| {side} | {1e3 * statistics.median(figures['first']):.0f} ms | {speed:.1f} "
                f"| {ratio(decode, decode_seconds(ours)):.2f} | {statistics.median(figures['whole']):.2f} s "
                f"| {ratio(figures['whole'], ours['whole']):.2f} | {figures['first_call']:.1f} s "
                f"| {figures['peak'] / 1e9:.2f} GB | {'yes' if figures['same_ids'] else 'no'} |"
            )
        if reader is not None:
            # The reader reads the weights once for each of its tokens, the first included.
            a_token = [seconds / args.new for seconds in reader["whole"]]
            limit = case["batch"] / statistics.median(a_token)
            steps = [seconds / (args.new - 1) for seconds in decode_seconds(ours)]
            lines.append(
                f"\nReading the weights once a step allows {limit:.1f} tokens/s; "
                f"optjax's decode reaches {100 * ratio(a_token, steps):.0f}% of that."
            )
    versions = {side: figures["version"] for side, figures in cases[0]["sides"].items()}
    lines += ["", f"Machine: {machine()}.", "Versions: " + ", ".join(f"{s} {v}" for s, v in versions.items()) + "."]
    lines += ["", f"Made by `python -m bench.decode_cpu {' '.join(sys.argv[1:])}`".rstrip() + ".", ""]
    return "\n".join(lines)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines()
             if line.startswith("model name")]  # fmt: skip
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
