"""Compiling a job's programs for devices that are not here, and what is then known of them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optjax.config import OPTConfig

from . import interconnect
from .hardware import Topology

# cuBLAS multiplies: without a GPU to try them on, Triton's kernels would be chosen blindly.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes, of one run of a program.

    Attributes:
      kind: ``all-gather`` and so on.
      axes: mesh axes that they run over.
      count: how many are carried out.
      bytes: on a device, in all.
      seconds: that they take at least, in all.
      overlapped: how many of them are started and finished apart.
      largest: bytes of the largest.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    seconds: float
    overlapped: int
    largest: int


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program. Bytes are per device.

    Attributes:
      name: of the program.
      groups: of its arguments by what they are; ``other`` is what belongs to no group.
      inside: of known values that are no arguments, such as gradients.
      arguments, peak: as the compiler has them; the peak holds the arguments.
      refused: where the compiler refused the program for its memory, its words; the peak is then what it asked for.
      traffic: its collectives.
      seconds: that compiling took.
    """

    name: str
    groups: dict[str, int]
    inside: dict[str, int]
    arguments: int
    peak: int
    refused: str | None
    traffic: tuple[Traffic, ...]
    seconds: float

    @property
    def interconnect(self) -> float:
        """Seconds that the collectives take at least: those along one mesh axis one after another, the axes, which have
        links of their own, side by side."""
        axes = {axis for each in self.traffic for axis in each.axes}
        return max((sum(each.seconds for each in self.traffic if axis in each.axes) for axis in axes), default=0.0)


def compile_job(
    config: OPTConfig,
    topology: Topology,
    *,
    job: str,
    mesh: Mapping[str, int],
    rules: Any,
    options: Mapping[str, Any],
    save: str | None = None,
) -> list[Compiled]:
    """Compiles all programs of a job. For a process with the environment of `devices.ENVIRONMENT`.

    Args:
      save: a folder for the programs' texts, if they are wanted.
    """
    from optjax.sharding import make_mesh, make_placement

    from .devices import devices
    from .program import find_job

    there = make_mesh(dict(mesh), devices(topology))
    placement = make_placement(there, rules, config, "causal_lm")
    return [compile_program(program, topology, there, save) for program in find_job(job)(config, placement, **options)]


def compile_program(program: Any, topology: Topology, mesh: Any, save: str | None = None) -> Compiled:
    """Compiles one program for the devices of a mesh."""
    import jax

    from .program import bytes_per_device

    groups = {name: bytes_per_device(tree) for name, tree in program.groups.items()}
    inside = {name: bytes_per_device(tree) for name, tree in program.inside.items()}
    start = time.perf_counter()
    options = program.compiler_options | (_GPU_OPTIONS if topology.chip.platform == "gpu" else {})
    try:
        compiled = program.function.lower(*program.arguments).compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        asked = memory_asked(str(error))
        if asked is None:
            raise
        taken = time.perf_counter() - start
        return Compiled(program.name, groups, inside, sum(groups.values()), asked, str(error), (), taken)
    taken = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if save:
        from pathlib import Path

        Path(save, f"{program.name.replace(' ', '_')}.hlo.txt").write_text(text, encoding="utf-8")
    other = memory.argument_size_in_bytes - sum(groups.values())
    return Compiled(
        name=program.name,
        groups=groups | ({"other": other} if other > 0 else {}),
        inside=inside,
        arguments=memory.argument_size_in_bytes,
        peak=device_peak(memory),
        refused=None,
        traffic=traffic(text, topology, mesh),
        seconds=taken,
    )


def device_peak(memory: Any) -> int:
    """The most bytes that a device holds at once, of a program's ``memory_analysis``.

    The compiler's peak counts arrays in the host's memory too. Where there are some, it is at most all of the device's
    arguments, results and temporaries together.
    """
    if not memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes + memory.host_temp_size_in_bytes:
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    together = memory.argument_size_in_bytes + max(results, 0) + memory.temp_size_in_bytes
    return min(memory.peak_memory_in_bytes, together)


def traffic(text: str, topology: Topology, mesh: Any) -> tuple[Traffic, ...]:
    """The collectives of a program's text, summed by kind and axes; the most bytes first."""
    from .collectives import collectives

    places = interconnect.positions(topology, list(mesh.devices.flat))
    sums: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for each in collectives(text, dict(mesh.shape)):
        group = interconnect.links(topology, [places[i] for i in each.group])
        took = interconnect.seconds(each.kind, each.bytes, group) * each.count
        total = sums.setdefault((each.kind, each.axes), [0, 0, 0.0, 0, 0])
        total[0] += each.count
        total[1] += each.total
        total[2] += took
        total[3] += each.count if each.overlapped else 0
        total[4] = max(total[4], each.bytes)
    made = [Traffic(kind, axes, *total) for (kind, axes), total in sums.items()]
    return tuple(sorted(made, key=lambda each: -each.bytes))


def memory_asked(message: str) -> int | None:
    """Bytes of HBM that a refused program would have used, from the compiler's words; None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    # Found out late, or early: where arguments and temporaries together are far too much.
    late, early = (
        r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
        r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
    )
    found = re.search(late, message) or re.search(early, message)
    if found is None:
        return None
    return int(float(found[1]) * 1024 ** "_KMGT".index(found[2] or "_"))


def to_json(compiled: Compiled) -> dict[str, Any]:
    """As plain data."""
    return asdict(compiled)


def from_json(data: Mapping[str, Any]) -> Compiled:
    """From what `to_json` made."""
    lines = tuple(Traffic(**{**each, "axes": tuple(each["axes"])}) for each in data["traffic"])
    return Compiled(**{**data, "traffic": lines})
