"""The chips that people rent, as data, and the shapes they come in.

Rates and capacities are per jax device, which is a chip but for TPU7x, whose chips are two devices each.

Sources:
  TPU: the system architecture pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x): peak
    bfloat16 FLOP/s, HBM bandwidth, interconnect (a link's share of one direction), data-centre network, shapes.
    v4's links: Jouppi et al. 2023 (TPU v4), table 4; its network, not published, is taken as v5p's.
    HBM capacity is what the TPU compiler (libtpu 0.0.42) lets a program use: less than what is sold.
  GPU: NVIDIA's data sheets of H100 SXM5 and A100 SXM4 80 GB (dense bfloat16), NVLink 4 and 3; the network of DGX H100
    (400 Gbit/s a GPU) and DGX A100 (200). Capacity is what the driver reports less `GPU_RESERVED`.
  Host link: GPU: PCIe 5 and 4 with 16 lanes, one direction, by the same data sheets. TPU: not in Google's pages; Austin
    et al. 2025 (How to Scale Your Model, part 2) have about 15 GB/s a chip and 32 for v6e. TPU7x is taken as v6e.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

GiB = 2**30
# A CUDA context, cuBLAS' workspaces and NCCL's buffers stand outside of what XLA plans.
GPU_RESERVED = 2 * GiB


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: as in a topology, ``v5p``.
      title: as its maker calls it.
      platform: ``"tpu"`` or ``"gpu"``.
      flops: peak bfloat16 FLOP/s of a device.
      hbm_bandwidth: bytes/s of a device.
      capacity: bytes of HBM that a program on one device can use.
      link_bandwidth: bytes/s in one direction; TPU: of one link to a neighbour, GPU: of all NVLinks of a device.
      network_bandwidth: bytes/s in one direction per device, out of the slice (TPU) or the host (GPU).
      host_bandwidth: bytes/s from the host's memory to a device.
      dimensions: of a TPU's torus; 0 where all devices of a host reach each other directly.
      devices_per_chip, devices_per_host: counts.
      largest: chips in the largest slice.
      kind: as jax calls it, ``jax.Device.device_kind``.
    """

    name: str
    title: str
    platform: str
    flops: float
    hbm_bandwidth: float
    capacity: int
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    dimensions: int = 0
    devices_per_chip: int = 1
    devices_per_host: int = 8
    largest: int = 0
    kind: str = ""


def _tpu(
    name: str, title: str, tflops: float, gbps: float, gib: float, link: float, network: float, host: float, **more
):
    rates = link * 1e9, network * 1e9, host * 1e9
    return Chip(name, title, "tpu", tflops * 1e12, gbps * 1e9, int(gib * GiB), *rates, **more)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 275, 1228, 30.75, 50, 6.25, 15, dimensions=3, devices_per_host=4, largest=4096,
             kind="TPU v4"),
        _tpu("v5e", "TPU v5e", 197, 819, 15.75, 50, 3.125, 15, dimensions=2, devices_per_host=4, largest=256,
             kind="TPU v5 lite"),
        _tpu("v5p", "TPU v5p", 459, 2765, 95.74, 100, 6.25, 15, dimensions=3, devices_per_host=4, largest=6144,
             kind="TPU v5"),
        _tpu(
            "v6e", "TPU v6e (Trillium)", 918, 1638, 31.25, 100, 12.5, 32,
            dimensions=2, devices_per_host=4, largest=256, kind="TPU v6 lite",
        ),
        # Per device, half of what the chip has.
        _tpu(
            "tpu7x", "TPU7x (Ironwood)", 2307 / 2, 7380 / 2, 94.75, 100, 6.25, 32 / 2,
            dimensions=3, devices_per_chip=2, devices_per_host=8, largest=9216, kind="TPU7x",
        ),
        Chip("h100", "H100 SXM 80 GB", "gpu", 989.4e12, 3352e9, 84_942_979_072 - GPU_RESERVED, 450e9, 50e9, 64e9,
             kind="NVIDIA H100 80GB HBM3"),
        Chip("a100", "A100 SXM 80 GB", "gpu", 312e12, 2039e9, 85_100_068_864 - GPU_RESERVED, 300e9, 25e9, 32e9,
             kind="NVIDIA A100-SXM4-80GB"),
    )
}  # fmt: skip

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Parts of a cube of 4x4x4; beyond it, slices are made of whole cubes.
_IN_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_TEXT = re.compile(r"(?:(\d+)[x*×])?([a-z]\w*)(?::(\d+(?:x\d+)*))?")


@dataclass(frozen=True)
class Topology:
    """What is rented: ``slices`` slices of ``shape`` chips of one kind; for GPUs the shape is their number."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        return max(1, self.devices // self.chip.devices_per_host)

    @property
    def slice_name(self) -> str:
        """One slice, ``v5p:4x4x8``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each dimension of a TPU's shape, whether its ends are linked: of v5e and v6e where it is 16, of the 3D
        tori where the slice is made of whole cubes."""
        if self.chip.platform != "tpu":
            return ()
        if self.chip.dimensions == 2:
            return tuple(n == 16 for n in self.shape)
        return (all(n % 4 == 0 for n in self.shape),) * len(self.shape)

    def __str__(self) -> str:
        return self.name


def parse_topology(text: str) -> Topology:
    """``v5p:4x4x8``, ``v5e:16x16``, ``h100:8`` (one host), ``h100:64``; ``2xv5e:16x16`` for two slices.

    Dimensions may come in any order: ``v5p:4x4x2`` is ``v5p:2x4x4``.

    Raises:
      ValueError: there is no such chip, or it does not come in that shape; the message lists those that exist.
    """
    found = _TEXT.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is no topology; write one as v5p:4x4x8, h100:8, or 2xv5e:16x16 for two slices")
    slices, name, shape = int(found[1] or 1), found[2], found[3]
    if name not in CHIPS:
        raise ValueError(f"no chip named {name!r}; there are: {', '.join(CHIPS)}")
    chip = CHIPS[name]
    wanted = tuple(map(int, shape.split("x"))) if shape else ()
    if slices < 1:
        raise ValueError(f"{text!r} has no slices")
    if chip.platform == "gpu":
        per_host = chip.devices_per_host
        if len(wanted) != 1 or not (wanted[0] in (1, 2, 4) or wanted[0] and wanted[0] % per_host == 0):
            parts = ", ".join(f"{name}:{n}" for n in (1, 2, 4, 8, 16, 24))
            raise ValueError(f"{text!r} does not exist; {name} comes as {parts} and so on, in hosts of {per_host}")
        if slices > 1:
            raise ValueError(f"{text!r}: GPUs come in hosts, not in slices; write {name}:{wanted[0] * slices}")
        return Topology(chip, wanted)
    existing = {tuple(sorted(each)): each for each in shapes(chip)}
    exact = existing.get(tuple(sorted(wanted)))
    if exact is None:
        raise ValueError(f"{text!r} does not exist; {name} comes as {_list_shapes(chip)}")
    return Topology(chip, exact, slices)


@cache
def shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The shapes a TPU slice comes in, smallest first; dimensions ascend, but for 2x2x1."""
    if chip.dimensions == 2:
        return _FLAT
    cubes = chip.largest // 64
    sides = range(4, 4 * cubes + 1, 4)
    large = [
        (a, b, c)
        for a in sides
        if (a // 4) ** 3 <= cubes
        for b in range(a, sides.stop, 4)
        if a * b * b <= chip.largest
        for c in range(b, chip.largest // (a * b) + 1, 4)
    ]
    return (*_IN_CUBE, *sorted(large, key=lambda shape: (math.prod(shape), shape[::-1])))


def _list_shapes(chip: Chip) -> str:
    names = ["x".join(map(str, shape)) for shape in shapes(chip)]
    if chip.dimensions == 2:
        return ", ".join(names)
    usual = [each for each in shapes(chip) if all(n & (n - 1) == 0 for n in each) and each[-1] <= 4 * each[0]]
    listed = ", ".join("x".join(map(str, shape)) for shape in usual)
    return f"{listed} and other multiples of 4 in each dimension, up to {chip.largest} chips"
