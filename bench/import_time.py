"""`import optjax` beside `import jax`: fresh processes in turn, medians, and the ratios.

The package imports jax when the first of its names is used, so that is measured too.

python -m bench.import_time [--rounds 11]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from bench.arguments import Parser

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
STATEMENTS = ("import jax", "import optjax", "import optjax; optjax.generate")


def main() -> None:
    parser = Parser("import_time", __doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for number in range(rounds + 1):
        for statement, times in seconds.items():
            command = [sys.executable, "-c", PROGRAM.format(statement)]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            out = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
            if number:  # the first round warms the disk's cache
                times.append(float(out.stdout))
    for statement, times in seconds.items():
        ratio = median(own / jax for own, jax in zip(times, seconds["import jax"], strict=True))
        print(f"{statement:34s} {1e3 * median(times):6.0f} ms   {ratio:5.2f} × import jax")


if __name__ == "__main__":
    main()
