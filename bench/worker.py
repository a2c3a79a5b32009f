"""A side in a process of its own, driven over pipes: one JSON object a line in, one out.

`Worker` is the driver's end; `python -m bench.worker SIDE OPTIONS`, these as JSON, the other. One process a side keeps
memory peaks apart, and keeping all of them alive lets the driver ask them in turn, so that they share the machine's
moods.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    def __init__(self, side: str, options: dict[str, Any], log: Path):
        """What the side prints goes to ``log``; the options are those of `bench.sides.limit` and of its ``load``."""
        self.side = side
        self._log = log
        command = [sys.executable, "-m", "bench.worker", side, json.dumps(options)]
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer; RuntimeError with what went wrong on the other side."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.side}: the process ended with status {self._process.wait()}\n{tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.side}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # of a process that ended by itself
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    # What libraries print must not meet the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from bench.sides import SIDES, limit

    limit(options)
    if name.startswith("attention:"):
        from bench.attention_sides import side as attention_side

        side: Any = attention_side(name.removeprefix("attention:"))
    elif name.startswith("train:"):
        from bench.train_sides import SIDES as TRAIN_SIDES

        side = TRAIN_SIDES[name.removeprefix("train:")]()
    else:
        side = SIDES[name]()
    for line in sys.stdin:
        try:
            answer = respond(side, options, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def respond(side: Any, options: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The answer to ``{"load": folder}``, or ``{"ids": prompts, "new": how many, "how": the strategy}``, each perhaps
    with ``"reset"`` of the memory's peak; or ``{"shape": of queries, …}``, for attention alone; or ``{"records": a
    batch, "steps": how many}``, for training."""
    import numpy as np

    if request.get("reset"):
        getattr(side, "reset_peak", reset_peak)()
    peak_of = getattr(side, "peak_bytes", peak_bytes)
    start = time.perf_counter()
    if "load" in request:
        side.load(Path(request["load"]), options)
        return {"seconds": time.perf_counter() - start, "peak": peak_of(), "version": side.version()}
    if "records" in request:
        return side.train(np.asarray(request["records"], np.int32), request["steps"]) | {"peak": peak_of()}
    if "shape" in request:
        return side.attend(**request)
    ids = np.asarray(request["ids"])
    start = time.perf_counter()
    out = side.generate(ids, request["new"], **request.get("how", {}))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_of(), "ids": np.asarray(out).tolist()}


def reset_peak() -> None:
    """Lets VmHWM start again from what is resident now; where the kernel refuses, the peak is of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
