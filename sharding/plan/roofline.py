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
      mfu: the most that model FLOPs utilization can be: model FLOPs over what the devices could do in `floor`.
      tokens_per_second: the most, over all devices.
    """

    compute: float
    memory: float
    interconnect: float
    mfu: float
    tokens_per_second: float

    @property
    def floor(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def total(self) -> float:
        """Seconds one after another: by how much two equal floors differ."""
        return self.compute + self.memory + self.interconnect

    @property
    def bound(self) -> str:
        """Which of the three the floor is."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(topology: Topology, work: Work, interconnect: float = 0.0) -> Roofline:
    """Of a program's work, and the seconds that its collectives take at least."""
    chip = topology.chip
    compute, memory = work.flops / chip.flops, work.hbm_bytes / chip.hbm_bandwidth
    floor = max(compute, memory, interconnect)
    mfu = work.model_flops / (topology.devices * chip.flops * floor)
    return Roofline(compute, memory, interconnect, mfu, work.tokens / floor)
