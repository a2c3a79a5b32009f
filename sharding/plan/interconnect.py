"""How long a collective takes at least, from the links that its devices have between them.

The model is the usual one: a collective is limited by the busiest link, all links of a group are used in both
directions at once, and nothing else uses them. Latency is left out, so small collectives take longer than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .hardware import Topology

# Within a TPU7x chip, the link between its two devices against one link to a neighbour chip (Cloud TPU docs, TPU7x).
WITHIN_CHIP = 6


@dataclass(frozen=True)
class Position:
    """Where a device stands: its slice or host, and the coordinates of its chip in the torus, with the core in it."""

    island: int
    coordinates: tuple[int, ...]


def positions(topology: Topology, devices: Sequence[Any]) -> list[Position]:
    """Of jax devices, real or ahead of time, in their order. GPUs stand by their ids, host after host."""
    if not topology.chip.dimensions:
        per_host = topology.chip.devices_per_host
        return [Position(device.id // per_host, (device.id % per_host,)) for device in devices]
    sides = len(topology.shape)
    return [
        Position(getattr(device, "slice_index", 0) or 0, (*device.coords[:sides], device.core_on_chip))
        for device in devices
    ]


@dataclass(frozen=True)
class Links:
    """What a group of devices has between its members.

    Attributes:
      size: devices in the group.
      islands: slices or hosts that it spans.
      local: bytes/s at which a device of the group receives from its own island, 0 where it is alone there.
      network: bytes/s at which all members of one island together receive from the others.
    """

    size: int
    islands: int
    local: float
    network: float


def links(topology: Topology, members: Sequence[Position]) -> Links:
    """Of a group. On a torus it has the links along every dimension it extends in, both ways where the ring closes."""
    chip = topology.chip
    islands = len({each.island for each in members})
    per_island = len(members) // islands
    network = chip.network_bandwidth * per_island
    if per_island < 2:
        return Links(len(members), islands, 0.0, network)
    if not chip.dimensions:
        return Links(len(members), islands, chip.link_bandwidth, network)
    # Devices of one chip share its links.
    one_way = chip.link_bandwidth / chip.devices_per_chip
    local = 0.0
    for dimension, (side, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
        extent = len({each.coordinates[dimension] for each in members})
        if extent > 1:
            local += one_way * (2 if wraps and extent == side else 1)
    if local == 0:  # the devices of one chip
        local = chip.link_bandwidth * WITHIN_CHIP
    return Links(len(members), islands, local, network)


def seconds(kind: str, size: float, group: Links) -> float:
    """The least time of one collective.

    Args:
      kind: ``all-gather`` (``size`` is its result), ``reduce-scatter`` (its operand), ``all-reduce``, ``all-to-all`` or
        ``collective-permute`` (either).
      size: bytes on a device.
    """
    n, m = group.size, group.islands
    if n < 2 or size == 0:
        return 0.0
    if kind == "collective-permute":
        return size / (group.local or group.network)
    if kind == "all-to-all":
        # Each device sends a part of its buffer to every other.
        local = size * (n // m - 1) / (n // m) / group.local if group.local else 0.0
        network = size * (n // m) * (m - 1) / m / group.network if m > 1 else 0.0
        return max(local, network)
    # Gathering: what a device lacks comes over the local links; of that, what its island lacks comes over the network.
    local = size * (n - 1) / n / group.local if group.local else 0.0
    network = size * (m - 1) / m / group.network if m > 1 else 0.0
    return max(local, network) * (2 if kind == "all-reduce" else 1)
