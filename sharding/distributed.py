"""Several processes, each with devices of its own, that run one program together."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of the run. To be called before anything else asks jax for devices.

    On Cloud TPU, Slurm, GKE (JobSet) and under MPI launchers nothing needs to be said: jax finds out. A process that is
    alone on its node has all GPUs there; of several each has the one of its number on the node. Elsewhere start
    one process on every host with the same ``coordinator_address`` and ``num_processes`` and its own ``process_id``, or
    set ``OPTJAX_COORDINATOR``, ``OPTJAX_NUM_PROCESSES`` and ``OPTJAX_PROCESS_ID``. A process that is alone stays alone,
    and a second call does nothing.

    Args:
      coordinator_address: ``host:port`` of the process with id 0, which all others can reach.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: some of the three are given and others not, or they make no sense.
      RuntimeError: jax has devices already, or the others were not there in time.
    """
    if jax.distributed.is_initialized():
        return
    coordinator_address = coordinator_address or os.environ.get("OPTJAX_COORDINATOR")
    num_processes = _number(num_processes, "OPTJAX_NUM_PROCESSES")
    process_id = _number(process_id, "OPTJAX_PROCESS_ID")
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if _in_cluster():
            _join()
        return
    if missing:
        raise ValueError(f"{' and '.join(missing)} should be given too, as a process cannot join the others without")
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    host, colon, port = coordinator_address.rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise ValueError(f"coordinator_address should be host:port, not {coordinator_address!r}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id {process_id} is not one of 0 to {num_processes - 1}, of {num_processes} processes"
        )
    _join(coordinator_address, num_processes, process_id)


def _join(*told: Any) -> None:
    visible = {name: jax.config.values[name] for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices")}
    jax.distributed.initialize(*told)
    if _alone_on_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under Slurm and Open MPI jax takes every process for one of a single GPU.
        for name, value in visible.items():
            jax.config.update(name, value)


def _alone_on_node() -> bool:
    """Whether Slurm or Open MPI have started one process on each node."""
    env = os.environ
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        return env["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return env.get("SLURM_STEP_NUM_NODES") == env.get("SLURM_NTASKS")


def _in_cluster() -> bool:
    """Whether this looks like one process of several, in an environment that jax can find its way in."""
    env = os.environ
    slurm = "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return slurm or mpi or kubernetes or _on_cloud_tpu()


def _on_cloud_tpu() -> bool:
    """Jobs on GKE say so in the environment; virtual machines only in their metadata, which jax asks."""
    named = os.environ.get("TPU_WORKER_HOSTNAMES")
    if named is not None:
        return len(named.split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    notebook = "COLAB_RELEASE_TAG" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    devices = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return devices and not notebook and importlib.util.find_spec("libtpu") is not None


def _number(value: int | None, variable: str) -> int | None:
    if value is not None:
        return value
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{variable} should be a whole number, not {text!r}")
    return int(text)
