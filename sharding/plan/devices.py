"""The devices of a topology that is not here, for compiling ahead of time.

The TPU compiler is in the libtpu wheel and XLA's GPU compiler in jax-cuda12-pjrt; both run on any Linux machine. libtpu
reads its environment when jax is imported, so compiling takes a process that was started with `ENVIRONMENT`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .hardware import Topology

# Quiet, without a lock file, without asking for a TPU; jax itself computes on the CPU. Warnings are kept: there the
# partitioner tells of arrays that it had to gather whole.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TF_CPP_MIN_LOG_LEVEL": "1",
}


def check_compiler(topology: Topology) -> None:
    """That the compiler for a topology is installed.

    Raises:
      ImportError: it is not; the message has the command that brings it.
    """
    if topology.chip.platform == "tpu":
        if find_spec("libtpu") is None:
            raise ImportError("compiling for TPU needs the libtpu wheel: pip install 'optjax[plan-tpu]'")
    elif find_spec("jax_cuda12_plugin") is None or find_spec("jax_plugins.xla_cuda12") is None:
        raise ImportError("compiling for GPU needs the jax-cuda12-pjrt wheel: pip install 'optjax[plan-gpu]'")


def devices(topology: Topology) -> list[Any]:
    """The devices, in the order of their ids. To be called in a process that has `ENVIRONMENT`.

    Raises:
      ImportError: as `check_compiler`.
    """
    from jax.experimental import topologies

    check_compiler(topology)
    chip = topology.chip
    if chip.platform == "gpu":
        per_host = min(chip.devices_per_host, topology.devices)
        config = Path(__file__).with_name("gpus") / f"{chip.name}.txtpb"
        shape = f"1x{topology.devices // per_host}x{per_host}"
        return list(
            topologies.get_topology_desc(
                platform="cuda", topology=shape, target_config=config.read_text(encoding="utf-8")
            ).devices
        )
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chips == topology.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as it is where jax runs on one
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **options).devices)
