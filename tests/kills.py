"""Runs that are killed again and again, beside one that is not.

  python tests/kills.py --kills 25 [--processes 2] [--seed 0]               # tests/loop_job.py: saves all the time
  python tests/kills.py --kills 25 --pretrain --longest 30 --steps 200      # optjax.train.pretrain, a small OPT

kills at random moments, by SIGKILL or SIGTERM in turn, one process of several at a time, and says how many of them fell
into a save, into the start and so on, and whether the weights ended in the same bits.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from processes import environments

from optjax.train.interrupt import STOPPED

PROGRAM = Path(__file__).with_name("loop_job.py")
LONG = 1800.0  # seconds that thousands of steps may take on a busy machine


def start(folder: Path, options: dict, more: dict, processes: int = 1, devices: int = 8) -> list[subprocess.Popen]:
    """tests/loop_job.py on every process, of `devices` in all."""
    return launch([str(PROGRAM), str(folder), json.dumps(options), json.dumps(more)], folder, processes, devices)


def launch(arguments: list[str], folder: Path, processes: int, devices: int = 8) -> list[subprocess.Popen]:
    """One command on every process, of `devices` in all; what it says is kept beside the folder."""
    started = []
    for i, environment in enumerate(environments(processes, devices)):
        command = [sys.executable, *arguments]
        out = open(folder.parent / f"{folder.name}-{i}.txt", "ab")
        started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        out.close()
    return started


def finish(started: list[subprocess.Popen], patience: float = 180.0) -> list[int]:
    """Waits for all; when one was killed the others have lost it, and are killed as a launcher would."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in started):
        lost = any(process.poll() not in (None, 0, STOPPED) for process in started)
        if lost or time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.02)
    return [process.wait() for process in started]


def output(folder: Path) -> str:
    return "".join(path.read_text()[-4000:] for path in sorted(folder.parent.glob(f"{folder.name}-*.txt")))


def finished(folder: Path, options: dict, more: dict, processes: int = 1) -> dict[str, np.ndarray]:
    """Runs tests/loop_job.py to the end; the state's leaves."""
    _finish_well(start(folder, options, more, processes), folder)
    return dict(np.load(folder / "final.npz"))


def _finish_well(started: list[subprocess.Popen], folder: Path, patience: float = 180.0) -> None:
    codes = finish(started, patience)
    assert set(codes) == {0}, (codes, output(folder))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class Program:
    """What is killed.

    Attributes:
      arguments: of Python, given the folder of the run.
      final: what a finished run has come to, by its folder.
    """

    arguments: Callable[[Path], list[str]]
    final: Callable[[Path], dict[str, np.ndarray]]


def loop_job(steps: int) -> Program:
    """tests/loop_job.py, with spikes and steps that are not finite, so that rollbacks have to come out the same too."""
    options = {"total_steps": steps, "save_every": 10, "log_every": 5, "eval_every": 100}
    plant = {str(n): 30.0 for start in range(200, 2 * steps, 1000) for n in range(start, start + 4)}
    plant |= {str(n): float("inf") for n in range(90, 2 * steps, 300)}
    given = json.dumps(options), json.dumps({"plant": plant, "slow": 0.002})
    return Program(
        arguments=lambda folder: [str(PROGRAM), str(folder), *given],
        final=lambda folder: dict(np.load(folder / "final.npz")),
    )


def pretrain(where: Path, steps: int) -> Program:
    """optjax.train.pretrain: a small OPT with dropout, over eight devices."""
    from safetensors.numpy import load_file

    from optjax.train.data import write_tokens

    config = {"model_type": "opt", "vocab_size": 512, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.1}
    (where / "config.json").write_text(json.dumps(config))
    if not (where / "text").exists():
        tokens = np.random.default_rng(0).integers(4, 512, 200_000) // 3 * 3  # there is something to learn
        write_tokens(where / "text", np.maximum(tokens, 4), vocab_size=512, bytes=len(tokens))
    words = f"--config {where}/config.json --data {where}/text --mesh fsdp=4,tensor=2 --micro-batches 2 --batch-size 16"
    words += f" --length 32 --lr 3e-3 --steps {steps} --save-every 10 --log-every 5 --eval-every {steps} --quiet"
    common = ["-m", "optjax.train.pretrain", *words.split(), "--no-tensorboard"]
    return Program(
        arguments=lambda folder: [*common, "--run", str(folder), "--export", str(folder / "model")],
        final=lambda folder: load_file(folder / "model" / "model.safetensors"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds until a kill, at most")
    parser.add_argument("--pretrain", action="store_true", help="a run of optjax.train.pretrain")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    where = args.folder or Path(tempfile.mkdtemp())
    where.mkdir(parents=True, exist_ok=True)
    program = pretrain(where, args.steps) if args.pretrain else loop_job(args.steps)

    def begin(folder: Path) -> list[subprocess.Popen]:
        return launch(program.arguments(folder), folder, args.processes)

    before = time.monotonic()
    _finish_well(begin(where / "whole"), where / "whole", LONG)
    print(f"undisturbed: {time.monotonic() - before:.0f} s", flush=True)
    folder, moments, deaths = where / "killed", Counter(), 0
    while deaths < args.kills:
        started = begin(folder)
        time.sleep(rng.uniform(0.5, args.longest))
        target, number = rng.choice(started), (signal.SIGKILL, signal.SIGTERM)[deaths % 2]
        saving = any((folder / "checkpoints").glob("*tmp*"))
        steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdecimal())
        if target.poll() is not None:
            print("finished before its kill:", finish(started), flush=True)
            break
        target.send_signal(number)
        codes = finish(started)
        deaths += 1
        moment = "while saving" if saving else "otherwise" if steps else "before the first checkpoint"
        moments[signal.Signals(number).name, moment] += 1
        print(f"{deaths}: {signal.Signals(number).name}, {moment}, after step {steps[-1:]}: {codes}", flush=True)
    _finish_well(begin(folder), folder, LONG)
    for (name, moment), count in sorted(moments.items()):
        print(f"{count:3d} {name} {moment}")
    alike = same(program.final(where / "whole"), program.final(folder))
    print(f"{deaths} kills; the final state is {'the same bits' if alike else 'NOT THE SAME'}")
    for name in ("whole", "killed"):
        events = [json.loads(line) for line in (where / name / "log.jsonl").read_text().splitlines()]
        print(name, Counter(event["event"] for event in events if "event" in event), events[-1]["step"])
    print(where)


if __name__ == "__main__":
    main()
