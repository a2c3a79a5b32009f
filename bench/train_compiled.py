"""The memory of a train step, plain and with what saves it, as the compilers of TPU and GPU see it for 64 chips.

    python -m bench.train_compiled                     # 1.3b and 13b on v5p:4x4x4 and h100:64: an hour on two cores
    python -m bench.train_compiled --sizes 1.3b --topologies v5p:4x4x4 --steps plain all

Needs the compilers: ``pip install 'optjax[plan-tpu,plan-gpu]'``. Nothing is run, and no weight exists. Figures are kept
in bench/results/train_compiled.json, and the program goes on where it was; each new one is written to
bench/results/train_compiled.md too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from bench.arguments import Parser

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN = {"remat": "none", "query_block": 0, "loss_chunks": 1}
FLASH = {"attn_implementation": "flash", "query_block": None}
STEPS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "all": PLAIN | {"remat": "full", "loss_chunks": None} | FLASH,
    "remat": PLAIN | {"remat": "full"},
    "remat, flash": PLAIN | {"remat": "full"} | FLASH,
}
NAMES = {
    "plain": "plain: all is kept, attention and loss in one piece",
    "remat": "layers computed again",
    "remat, flash": "layers computed again, attention by a flash kernel",
    "all": "layers computed again, attention by a flash kernel, the loss in chunks",
}


def main() -> None:
    args = parse()
    file = args.results / "train_compiled.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for size, topology, step in itertools.product(args.sizes, args.topologies, args.steps):
        name = f"{size} {topology} {step}"
        if name in known:
            continue
        print(name, file=sys.stderr)
        known[name] = compile_step(size, topology, step)
        args.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1) + "\n")
        (args.results / "train_compiled.md").write_text(markdown(known))
    print(markdown(known))


def parse() -> argparse.Namespace:
    parser = Parser("train_compiled", __doc__)
    parser.add_argument("--sizes", nargs="+", default=["1.3b", "13b"])
    parser.add_argument("--topologies", nargs="+", default=["v5p:4x4x4", "h100:64"])
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that figures are kept in")
    return parser.parse_args()


def compile_step(size: str, topology: str, step: str) -> dict[str, Any]:
    """What `optjax plan` says of a step of the paper's batch, in as many micro-batches as it would choose for all."""
    from optjax.sharding.plan import make_request, plan

    chosen = make_request(f"opt-{size}", topology, **STEPS["all"])
    made = plan(f"opt-{size}", topology, micro_batches=chosen.options["micro_batches"], **STEPS[step])
    found, compiled = made.to_dict(), made.main.compiled
    kept = ("command", "mesh", "rules", "options", "capacity", "peak", "fits", "gathered_whole")
    more = {"state": compiled.arguments, "refused": compiled.refused is not None, "seconds": made.seconds}
    return {name: found[name] for name in kept} | more


def markdown(known: dict[str, Any]) -> str:
    lines = [
        "# The memory of a train step",
        "",
        "    python -m bench.train_compiled",
        "",
        "By the compilers' figures for slices of 64 chips, as `optjax plan` gives them; nothing was run. The batch is "
        "the paper's, rows of 2048 tokens, computed in bfloat16 over weights and moments in float32; every step of a "
        "size has the same mesh and micro-batches. *Peak*: the most bytes that a device holds at once, weights and "
        "moments among them. *Beside the state*: what it holds beside those. A step that the compiler refuses for its "
        "memory has what it asked for.",
    ]
    for size, topology in dict.fromkeys(tuple(name.split(" ")[:2]) for name in known):
        steps = {step: known[name] for step in NAMES if (name := f"{size} {topology} {step}") in known}
        first = next(iter(steps.values()))
        lines += [
            "",
            f"## OPT-{size} on {topology}",
            "",
            f"{first['mesh']}, {first['options']['batch']} rows in {first['options']['micro_batches']} micro-batches; "
            f"a device has {_gib(first['capacity'])} GiB, of which weights and moments take {_gib(first['state'])}.",
            "",
            "| step | peak, GiB | of the plain one | beside the state, GiB | of the plain one |",
            "|-|-:|-:|-:|-:|",
        ]
        plain = steps.get("plain")
        for step, found in steps.items():
            rest, fits = found["peak"] - found["state"], "" if found["fits"] else " (does not fit)"
            row = [NAMES[step], _gib(found["peak"]) + fits, _share(found["peak"], plain and plain["peak"]), _gib(rest)]
            row.append(_share(rest, plain and plain["peak"] - plain["state"]))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _share(part: float, whole: float | None) -> str:
    return "" if not whole else f"{part / whole:.1%}"


if __name__ == "__main__":
    main()
