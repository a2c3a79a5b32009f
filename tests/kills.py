"""Runs of tests/loop_job.py that are killed again and again, beside one that is not.

  python tests/kills.py --kills 25 [--processes 2] [--seed 0]

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
from pathlib import Path

import numpy as np
from processes import environments

PROGRAM = Path(__file__).with_name("loop_job.py")


def start(folder: Path, options: dict, more: dict, processes: int = 1, devices: int = 8) -> list[subprocess.Popen]:
    """One command on every process, of `devices` in all."""
    started = []
    for i, environment in enumerate(environments(processes, devices)):
        command = [sys.executable, str(PROGRAM), str(folder), json.dumps(options), json.dumps(more)]
        out = open(folder.parent / f"{folder.name}-{i}.txt", "ab")
        started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        out.close()
    return started


def finish(started: list[subprocess.Popen], patience: float = 180.0) -> list[int]:
    """Waits for all; when one was killed the others have lost it, and are killed as a launcher would."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in started):
        lost = any(process.poll() not in (None, 0) for process in started)
        if lost or time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.02)
    return [process.wait() for process in started]


def output(folder: Path) -> str:
    return "".join(path.read_text()[-4000:] for path in sorted(folder.parent.glob(f"{folder.name}-*.txt")))


def finished(folder: Path, options: dict, more: dict, processes: int = 1) -> dict[str, np.ndarray]:
    """Runs to the end; the state's leaves."""
    codes = finish(start(folder, options, more, processes))
    assert set(codes) == {0} and (folder / "final.npz").is_file(), (codes, output(folder))
    return dict(np.load(folder / "final.npz"))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds until a kill, at most")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    where = args.folder or Path(tempfile.mkdtemp())
    options = {"total_steps": args.steps, "save_every": 10, "log_every": 5, "eval_every": 100}
    # Spikes and steps that are not finite, so that rollbacks have to come out the same too.
    plant = {str(n): 30.0 for start in range(200, 2 * args.steps, 1000) for n in range(start, start + 4)}
    plant |= {str(n): float("inf") for n in range(90, 2 * args.steps, 300)}
    more = {"plant": plant, "slow": 0.002}
    before = time.monotonic()
    whole = finished(where / "whole", options, more, args.processes)
    print(f"undisturbed: {time.monotonic() - before:.0f} s", flush=True)
    folder, moments, deaths = where / "killed", Counter(), 0
    while deaths < args.kills:
        started = start(folder, options, more, args.processes)
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
    killed = finished(folder, options, more, args.processes)
    for (name, moment), count in sorted(moments.items()):
        print(f"{count:3d} {name} {moment}")
    print(f"{deaths} kills; the final state is {'the same bits' if same(whole, killed) else 'NOT THE SAME'}")
    for name in ("whole", "killed"):
        events = [json.loads(line) for line in (where / name / "log.jsonl").read_text().splitlines()]
        print(name, Counter(event["event"] for event in events if "event" in event), events[-1]["step"])
    print(where)


if __name__ == "__main__":
    main()
