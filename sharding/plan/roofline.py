"""The least time of a step: the slowest of compute, memory and interconnect, as if they ran side by side."""

from __future__ import annotations

from dataclasses import dataclass

from .analytic import Work
from .hardware import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program on every device, by what takes them.

    Attributes:
      compute, memory, interconnect: seconds each takes alone at its peak rate.
      host, disk: the same of weights that come from the host's memory, and from disk.
      mfu: the most that model FLOPs utilization can be: model FLOPs over what the devices could do in `floor`.
      tokens_per_second: the most, over all devices.
    """

    compute: float
    memory: float
    interconnect: float
    mfu: float
    tokens_per_second: float
    host: float = 0.0
    disk: float = 0.0

    @property
    def floor(self) -> float:
        return max(self.compute, self.memory, self.interconnect, self.host, self.disk)

    @property
    def total(self) -> float:
        """Seconds one after another: by how much two equal floors differ."""
        return self.compute + self.memory + self.interconnect + self.host + self.disk

    @property
    def bound(self) -> str:
        """Which of them the floor is."""
        return max(("compute", "memory", "interconnect", "host", "disk"), key=lambda name: getattr(self, name))


def roofline(
    topology: Topology, work: Work, interconnect: float = 0.0, disk_bandwidth: float | None = None
) -> Roofline:
    """Of a program's work, the seconds that its collectives take at least, and the bytes/s of the host's disk."""
    chip = topology.chip
    compute, memory = work.flops / chip.flops, work.hbm_bytes / chip.hbm_bandwidth
    host = work.host_bytes / chip.host_bandwidth
    disk = work.disk_bytes / disk_bandwidth if disk_bandwidth else 0.0
    floor = max(compute, memory, interconnect, host, disk)
    mfu = work.model_flops / (topology.devices * chip.flops * floor)
    return Roofline(compute, memory, interconnect, mfu, work.tokens / floor, host, disk)
