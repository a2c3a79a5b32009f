"""Several processes of one program on this machine, with eight emulated devices between them."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environments(processes: int, devices: int = 8) -> list[dict[str, str]]:
    """What each process is started with; one alone joins no others."""
    count = "--xla_force_host_platform_device_count="
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
    flags = [*others, f"{count}{devices // processes}"]
    alike = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    if processes == 1:
        return [alike]
    alike |= {"OPTJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "OPTJAX_NUM_PROCESSES": str(processes)}
    return [alike | {"OPTJAX_PROCESS_ID": str(i)} for i in range(processes)]
