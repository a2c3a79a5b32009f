"""The one place that makes meshes: which devices stand where on the axes data, fsdp, sequence and tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# From the slowest network to the fastest.
AXES = {
    "data": "copies of the weights, over the data-centre network: one for each slice or group of hosts",
    "fsdp": "the batch; and weights, gradients and optimizer state, which are gathered where they are used",
    "sequence": "the length of the sequence (context parallelism)",
    "tensor": "heads, feed-forward and vocabulary within a layer (Megatron)",
}


def parse_mesh(spec: str | Mapping[str, int] | None, devices: int | None = None) -> dict[str, int]:
    """The size of every axis, from ``"fsdp=16,tensor=8"`` or a mapping; an axis that is not named has size 1.

    Args:
      spec: one size may be -1: all devices that the other axes leave. None is ``fsdp=-1``.
      devices: how many there are, if known.

    Raises:
      ValueError: no such axis, a size that makes no sense, or sizes that do not make up the devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    if not isinstance(spec, str | Mapping | None):
        raise ValueError(f"a mesh is given like 'fsdp=16,tensor=8' or {{'fsdp': 16, 'tensor': 8}}, not {spec!r}")
    given = {"fsdp": -1} if spec is None else _split(spec) if isinstance(spec, str) else dict(spec)
    for name, size in given.items():
        if name not in AXES:
            raise ValueError(f"a mesh has no axis {name!r}; there are: {', '.join(AXES)}")
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ValueError(f"mesh axis {name} should be a positive integer, or -1 for the rest, not {size!r}")
        sizes[name] = int(size)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"only one mesh axis can be -1, not {' and '.join(open_axes)}")
    if devices is None:
        if open_axes:
            raise ValueError(f"how large {open_axes[0]}=-1 is depends on the number of devices")
        return sizes
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % fixed == 0:
        sizes[open_axes[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh {format_mesh(sizes)} is for {'a multiple of ' if open_axes else ''}{fixed} devices, and there are "
            f"{devices}; sizes should multiply to {devices}, or leave one at -1"
        )
    return sizes


def format_mesh(mesh: Mesh | Mapping[str, int]) -> str:
    """``"fsdp=16,tensor=8"``: the axes that are larger than 1."""
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else mesh
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "one device"


def make_mesh(spec: str | Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over devices, in an order that puts neighbours of the inner axes on neighbouring chips.

    Where the devices lie in several slices (or processes with GPUs), ``data``, and after it ``fsdp``, run over the
    slower network between these, and the other axes stay inside.

    Args:
      spec: as for `parse_mesh`; None spreads everything over ``fsdp``.
      devices: all of ``jax.devices()`` by default; or those of an ahead-of-time topology.

    Raises:
      ValueError: as `parse_mesh`, or axes that cannot be laid over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("a mesh has at least one device, and there are none")
    sizes = parse_mesh(spec, len(devices))
    return Mesh(_ordered(sizes, devices), tuple(AXES), axis_types=(AxisType.Auto,) * len(AXES))


def _ordered(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    from jax.experimental import mesh_utils

    shape = tuple(sizes.values())
    slices = {getattr(device, "slice_index", None) for device in devices}
    if devices[0].platform == "gpu" and len({device.process_index for device in devices}) > 1:
        groups, by_process = len({device.process_index for device in devices}), True
    else:
        groups, by_process = len(slices), False
    if groups == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = _outer(sizes, groups)
    inner = tuple(size // out for size, out in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _outer(sizes: dict[str, int], groups: int) -> tuple[int, ...]:
    """How much of each axis runs between groups of devices: as much of ``data`` as goes, then of ``fsdp``."""
    outer, left = dict.fromkeys(sizes, 1), groups
    for name in ("data", "fsdp"):
        outer[name] = math.gcd(sizes[name], left)
        left //= outer[name]
    if left > 1:
        raise ValueError(
            f"mesh {format_mesh(sizes)} would run its sequence or tensor axis between {groups} slices; "
            f"data × fsdp should be a multiple of {groups}"
        )
    return tuple(outer.values())


def _split(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, size = part.partition("=")
        name = name.strip()
        try:
            number = int(size)
        except ValueError:
            number = None
        if not equals or number is None:
            raise ValueError(f"a mesh is written like fsdp=16,tensor=8, and {part!r} is not axis=size")
        if name in sizes:
            raise ValueError(f"mesh axis {name} is named twice in {text!r}")
        sizes[name] = number
    return sizes
