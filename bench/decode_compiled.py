"""A decode step of optjax beside FlaxOPT's, as the compilers of TPU and GPU see them, for chips that are not here.

    python -m bench.decode_compiled                        # all sizes, chips, batches, contexts: an hour or two
    python -m bench.decode_compiled --sizes 1.3b --chips v5e --batches 8
    python -m bench.decode_compiled --quantization int8 --sides optjax
    python -m bench.decode_compiled --whole --sizes 1.3b   # also compiles all layers, to check the extrapolation

Needs the compilers: ``pip install libtpu``, and for h100 the jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12 wheels. Nothing
is run, and no weight exists. Figures are kept in bench/results/decode_compiled.json, and the program goes on where it
was; each new one is written to bench/results/decode_compiled.md too.

All layers of a model are alike. So programs of 2 and of 4 layers are compiled, and what 2 layers add is counted for
each pair of the others: 13b in bfloat16 would fit neither a v5e nor a v6e, and programs of 40 layers take minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import compiled_report
from bench.arguments import Parser
from bench.compiled_worker import SIDES, SLICES, Case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b")
LAYERS = (2, 4)
NEEDS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}


def main() -> None:
    args = parse()
    results = args.results / "decode_compiled.json"
    known: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    done = [Case(**each["case"]) for each in known]
    for group in groups(args, done):
        for case, found in compile_all(group):
            where = f"{case.chip} batch {case.batch}, {case.context} columns"
            print(f"{case.side} {case.size} {where}, {case.layers} layers", file=sys.stderr)
            known.append({"case": asdict(case), "found": found})
            args.results.mkdir(parents=True, exist_ok=True)
            results.write_text("[\n" + ",\n".join(map(json.dumps, known)) + "\n]\n")
            (args.results / "decode_compiled.md").write_text(compiled_report.markdown(known))
    print(compiled_report.markdown(known))


def parse() -> argparse.Namespace:
    parser = Parser("decode_compiled", __doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    own = [chip for chip in SLICES if _has(chip)]
    parser.add_argument("--chips", nargs="+", choices=list(SLICES), default=own, help="whose compiler is installed")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048], help="columns of the cache")
    parser.add_argument("--quantization", help="of optjax's weights: int8, int4 or nf4")
    parser.add_argument("--cache-dtype", help="of optjax's cache; by default bfloat16")
    parser.add_argument("--whole", action="store_true", help="also compile all layers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that figures are kept in")
    args = parser.parse_args()
    missing = [chip for chip in args.chips if not _has(chip)]
    if missing:
        parser.error(f"the compiler for {', '.join(missing)} is not installed; python -m bench.decode_compiled --help")
    return args


def groups(args: argparse.Namespace, done: list[Case]) -> Iterator[list[Case]]:
    """What is still to be compiled: by size and side, as a process of its own serves each."""
    import optjax

    for size, side in itertools.product(args.sizes, args.sides):
        whole = optjax.OPTConfig.preset("opt-" + size).num_hidden_layers
        options: dict[str, Any] = dict(quantization=args.quantization, cache_dtype=args.cache_dtype)
        own = options if side == "optjax" else {}
        cases = [
            Case(side, size, chip, batch, context, layers, **own)
            for chip, batch, context, layers in itertools.product(
                args.chips, args.batches, args.contexts, (*LAYERS, *[whole] * args.whole)
            )
        ]
        # On a GPU nothing is estimated, of which plain products would be the measure.
        cases = [case for case in cases if case not in done and (side, case.chip) != ("products", "h100")]
        if cases:
            yield cases


def compile_all(cases: list[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """What the compiler says of each case, as it comes; a crash ends the process, and the cases after it."""
    from optjax.sharding.plan import ENVIRONMENT

    worker = subprocess.Popen(
        [sys.executable, "-m", "bench.compiled_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("OPTJAX_DEBUG") else subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
        text=True,
        cwd=ROOT,
    )
    assert worker.stdin is not None and worker.stdout is not None
    with worker:
        worker.stdin.write(json.dumps([asdict(case) for case in cases]))
        worker.stdin.close()
        for case, line in zip(cases, worker.stdout, strict=False):
            yield case, json.loads(line)


def _has(chip: str) -> bool:
    return importlib.util.find_spec(NEEDS["gpu" if chip == "h100" else "tpu"]) is not None


if __name__ == "__main__":
    main()
