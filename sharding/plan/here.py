"""The devices of this process as a topology: for choosing a mesh, and for what they could reach at most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax

from .hardware import CHIPS, Chip, Topology


def topology_here(devices: Sequence[Any] | None = None) -> Topology:
    """All devices of the run (by default ``jax.devices()``), of which the first tells what kind they are.

    A kind that is not in `CHIPS` has a capacity, and rates of a rough guess: enough to compare meshes with, and nothing
    to quote.
    """
    devices = list(jax.devices() if devices is None else devices)
    chip = chip_here(devices[0]) or _guessed(devices[0])
    if not chip.dimensions:
        return Topology(chip, (len(devices),))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sides = (len({device.coords[i] for device in devices}) for i in range(chip.dimensions))
    return Topology(chip, tuple(sides), slices)


def chip_here(device: Any = None) -> Chip | None:
    """What a device (by default the first) is, if it is in `CHIPS`."""
    kind = (jax.devices()[0] if device is None else device).device_kind
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def _guessed(device: Any) -> Chip:
    # Of one of its own: no process can ask another's, and all should guess the same.
    stats = jax.local_devices()[0].memory_stats() or {}
    capacity, rates = stats.get("bytes_limit"), (1e14, 1e12, 5e10, 5e9, 2e10)
    if capacity is None:  # a CPU: half of the memory, shared among as many devices as it plays
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // jax.local_device_count()
    per_host = jax.local_device_count()
    flops, hbm, link, network, host = rates
    name = device.platform
    return Chip(name, device.device_kind, name, flops, hbm, capacity, link, network, host, devices_per_host=per_host)
