"""Training on a CPU in float32, in turn: optjax, transformers on torch with its AdamW, FlaxOPT with optax.

    python -m bench.train_cpu           # 4 layers, 256 wide, 8 rows of 512 tokens: a few minutes
    python -m bench.train_cpu --save    # also writes bench/results/train_cpu.md

All begin with the same weights and take the same batch; their losses are compared too. A round is some updates of each
side in turn, and the ratios are those of each round's medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.arguments import Parser
from bench.report import machine
from bench.worker import ROOT, Worker

NAMES = {"optjax": "optjax", "torch": "transformers, torch", "flax": "FlaxOPT, optax"}


def main() -> None:
    args = parse()
    shape = {"vocab_size": args.vocab, "hidden_size": args.width, "ffn_dim": 4 * args.width, "dropout": 0.0,
             "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
             "max_position_embeddings": args.length}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="optjax-bench-") as name:
        folder = Path(name)
        _prepare(folder, shape, ["flax"] if "flax" in args.sides else [])
        found = measure(args, folder)
    text = markdown(args, found)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(found))
    if args.save:
        (ROOT / "bench" / "results" / "train_cpu.md").write_text(text)


def parse() -> argparse.Namespace:
    parser = Parser("train_cpu", __doc__)
    parser.add_argument("--sides", nargs="+", choices=list(NAMES), default=list(NAMES))
    for name, default in (("layers", 4), ("width", 256), ("heads", 4), ("vocab", 8192), ("length", 512), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="updates of a side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stacked", action="store_true", help="optjax's layers in a scan, which compiles faster")
    parser.add_argument("--save", action="store_true", help="also write bench/results/train_cpu.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure")
    return parser.parse_args()


def _prepare(folder: Path, shape: dict[str, Any], formats: list[str]) -> None:
    """In a process of its own: torch's memory and threads go with it."""
    code = "import json, sys; from bench.prepare import write_all; write_all(*json.loads(sys.argv[1]))"
    arguments = json.dumps([str(folder), shape, formats])
    subprocess.run([sys.executable, "-c", code, arguments], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    options = {"threads": args.threads, "stacked": args.stacked}
    records = np.random.default_rng(0).integers(3, args.vocab, (args.batch, args.length + 1)).tolist()
    workers = {side: Worker(f"train:{side}", options, folder / f"{side}.log") for side in args.sides}
    found = {}
    try:
        for side, worker in workers.items():
            loaded = worker.ask(load=str(folder))
            first = worker.ask(records=records, steps=1, reset=True)
            found[side] = {"side": side, "version": loaded["version"], "first": first["seconds"][0], "rounds": []}
            found[side]["losses"] = first["losses"]
        for _ in range(args.rounds):
            for side, worker in workers.items():
                answer = worker.ask(records=records, steps=args.steps)
                found[side]["rounds"].append(median(answer["seconds"]))
                found[side]["losses"] += answer["losses"]
                found[side]["peak"] = answer["peak"]
    finally:
        for worker in workers.values():
            worker.close()
    return list(found.values())


def markdown(args: argparse.Namespace, found: list[dict[str, Any]]) -> str:
    about, base = machine(), found[0]
    versions = "; ".join(f"{NAMES[each['side']].split(',')[0]} {each['version']}" for each in found)
    lines = [
        "# Training on a CPU",
        "",
        "    python -m bench.train_cpu --save",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['memory']}; {args.threads} threads each. {versions}; "
        f"Python {about['python']}. {about['date']}.",
        "",
        f"{args.layers} layers, {args.width} wide, {args.heads} heads, a vocabulary of {args.vocab}; {args.batch} rows "
        f"of {args.length} tokens, float32, AdamW, the gradient clipped. Medians of {args.rounds} rounds of "
        f"{args.steps} updates, the sides in turn. *{NAMES[base['side']]}*: how many times as fast it is, by rounds. "
        "*Loss*: after all updates, on the same batch from the same weights.",
        "",
        f"|  | a step, s | tokens/s | {NAMES[base['side']]} | peak, MB | first step, s | loss |",
        "|-|-:|-:|-:|-:|-:|-:|",
    ]
    for each in found:
        seconds = median(each["rounds"])
        ratio = median(other / own for other, own in zip(each["rounds"], base["rounds"], strict=True))
        row = [NAMES[each["side"]], f"{seconds:.3f}", f"{args.batch * args.length / seconds:,.0f}"]
        row += ["" if each is base else f"{ratio:.2f}×", f"{each['peak'] / 1e6:.0f}", f"{each['first']:.1f}"]
        lines.append("| " + " | ".join([*row, f"{each['losses'][-1]:.5f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
