"""Having a process of its own compile: libtpu reads its environment when jax is imported, and a compiler may crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optjax.config import OPTConfig

from .compiling import Compiled, from_json
from .devices import ENVIRONMENT, check_compiler
from .hardware import Topology

_REMATERIALIZED = "Involuntary full rematerialization"


def ask(
    config: OPTConfig,
    topology: Topology,
    *,
    job: str,
    mesh: Mapping[str, int],
    rules: Any,
    options: Mapping[str, Any],
    save: str | None = None,
) -> tuple[list[Compiled], int]:
    """`compile_job` in a process of its own.

    Returns:
      What is known of each program; and how many arrays the partitioner says that it had to gather whole for want of a
      better way ("involuntary full rematerialization").

    Raises:
      ImportError: the compiler is not installed.
      ValueError: what the request asks for makes no sense: rules that do not fit, an unknown option; or arrays in the
        memory of a GPU's host.
      RuntimeError: the compiler failed.
    """
    in_host = [name for name in ("offload", "moments_memory") if options.get(name) == "host"]
    if topology.chip.platform == "gpu" and in_host:
        # A GPU that is only described has no host memory: all would be compiled, and counted, as on the device.
        raise ValueError(
            f"{in_host[0]}='host' cannot be planned for GPUs: their compiler knows the host's memory only where there "
            "is a GPU; plan it for TPUs, or leave it out"
        )
    check_compiler(topology)
    request = {
        "config": config.to_dict(),
        "topology": topology.name,
        "job": job,
        "mesh": dict(mesh),
        "rules": rules,
        "options": dict(options),
        "save": save,
    }
    with tempfile.TemporaryDirectory(prefix="optjax-plan-") as folder:
        answer = Path(folder) / "answer.json"
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("XLA_FLAGS", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "optjax.sharding.plan.worker", str(answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        try:
            _, words = process.communicate(json.dumps(request))
        except BaseException:  # Ctrl-C: a compiler does not hear it
            process.kill()
            process.wait()
            raise
        if not answer.exists():
            raise RuntimeError(_why(process.returncode, words))
        made = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in made:
        if os.environ.get("OPTJAX_DEBUG", "0") not in ("", "0"):
            sys.stderr.write(words)
        kinds: dict[str, type[Exception]] = {"ValueError": ValueError, "ImportError": ImportError}
        raise kinds.get(made["kind"], RuntimeError)(made["error"])
    return [from_json(each) for each in made["programs"]], words.count(_REMATERIALIZED)


def _why(status: int, words: str) -> str:
    if status == -signal.SIGKILL:
        return "the compiler was killed, most likely for want of memory on this machine"
    last = [line for line in words.splitlines() if line.strip()][-3:]
    return f"the compiler stopped with status {status}: {' '.join(last) or 'it said nothing'}"
