"""`plan`: what a size needs on a slice, by the compiler of that slice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optjax.config import OPTConfig
from optjax.sharding.mesh import format_mesh
from optjax.sharding.rules import Rules

from .analytic import Work
from .asking import ask
from .compiling import Compiled, from_json, to_json
from .hardware import Topology
from .request import Request, make_request
from .roofline import Roofline, roofline
from .working_set import working_set


@dataclass(frozen=True)
class Step:
    """One compiled program of a plan: what it does, what the compiler says, and how long it takes at least."""

    work: Work
    compiled: Compiled
    roofline: Roofline

    @property
    def over(self) -> float:
        """The compiled peak against the analytic minimum."""
        return self.compiled.peak / self.work.least_memory

    def memory(self) -> dict[str, int]:
        """Bytes of a device at the peak, by what they are; ``temporaries`` is what has no name.

        The activations that are kept for the backward pass are those of the analytic minimum.
        """
        parts = {**self.compiled.groups, **self.compiled.inside}
        rest = max(0, self.compiled.peak - sum(parts.values()))
        if "activations" in self.work.memory:
            parts["activations kept"] = min(rest, self.work.memory["activations"])
            rest -= parts["activations kept"]
        return parts | {"temporaries": rest}


@dataclass(frozen=True)
class Plan:
    """What a job needs. Printed, it is a table; in a notebook too.

    Attributes:
      request: what was asked, complete.
      steps: the job's compiled programs by name: ``train step``; or ``prefill`` and ``decode step``.
      gathered_whole: arrays that the partitioner had to gather whole for want of a better way.
    """

    request: Request
    steps: dict[str, Step]
    gathered_whole: int = 0

    @property
    def topology(self) -> Topology:
        return self.request.topology

    @property
    def capacity(self) -> int:
        """Bytes of HBM that a device has."""
        return self.topology.chip.capacity

    @property
    def peak(self) -> int:
        """Bytes that a device needs, in the program that needs most."""
        return max(step.compiled.peak for step in self.steps.values())

    @property
    def spare(self) -> int:
        """Bytes left over on a device; negative where the job does not fit."""
        return self.capacity - self.peak

    @property
    def fits(self) -> bool:
        return self.spare >= 0 and not any(step.compiled.refused for step in self.steps.values())

    @property
    def working_set(self) -> dict[str, int]:
        """Bytes that a device has in use while it computes, beside the least and not all at once; see `working_set`."""
        return working_set(self.request)

    @property
    def main(self) -> Step:
        """The program that takes the time: the train step, or the decode step."""
        return list(self.steps.values())[-1]

    @property
    def seconds(self) -> float:
        """That compiling took."""
        return sum(step.compiled.seconds for step in self.steps.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data: bytes, seconds, FLOPs; per device where a name does not say otherwise."""
        request, chip = self.request, self.topology.chip
        return {
            "command": request.command(),
            "size": request.size,
            "job": request.job,
            "topology": self.topology.name,
            "chip": chip.title,
            "devices": self.topology.devices,
            "mesh": format_mesh(request.mesh),
            "rules": request.rules if isinstance(request.rules, str) else dict(request.rules),
            "options": request.options,
            "capacity": self.capacity,
            "peak": self.peak,
            "fits": self.fits,
            "spare": self.spare,
            "gathered_whole": self.gathered_whole,
            "working_set": self.working_set,
            "steps": {
                name: {
                    "memory": step.memory(),
                    "least_memory": {**step.work.memory, "total": step.work.least_memory},
                    "peak_over_least": step.over,
                    "model_flops_of_all_devices": step.work.model_flops,
                    "flops": step.work.flops,
                    "hbm_bytes": step.work.hbm_bytes,
                    "host_bytes": step.work.host_bytes,
                    "disk_bytes": step.work.disk_bytes,
                    "seconds_at_least": asdict(step.roofline) | {"floor": step.roofline.floor},
                    "bound": step.roofline.bound,
                    "tokens": step.work.tokens,
                    "compiled": to_json(step.compiled),
                }
                for name, step in self.steps.items()
            },
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text; written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Any:
        """Memory of a device against its capacity, and what takes the time, as a matplotlib figure; saved to ``path``.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from .plot import plot

        return plot(self, path)

    def __str__(self) -> str:
        from .table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from .table import as_html

        return as_html(self)


def plan(
    size: str | OPTConfig,
    topology: str | Topology,
    job: str = "train",
    *,
    mesh: str | Mapping[str, int] | None = "auto",
    rules: str | Rules | None = None,
    save: str | None = None,
    **options: Any,
) -> Plan:
    """Compiles a job for a slice that need not be there, and says what it needs.

    Args:
      size: a published size such as ``"opt-175b"``, or a config.
      topology: ``"v5p:4x4x8"``, ``"h100:8"``, ``"2xv5e:16x16"``; see `parse_topology`.
      job: ``"train"``, one step; or ``"generate"``, reading prompts and one decode step over a full cache.
      mesh: ``"fsdp=32,tensor=4"`` or a dict; ``"auto"`` chooses.
      rules: a name of `optjax.sharding.RULES` or a dict; by default all of them together.
      save: a folder for the compiled programs' texts.
      **options: to train: ``batch`` rows (by default as in the paper) of ``length`` tokens, in ``micro_batches``
        (``"auto"``: as many as cost no time), and the other levers of a step, ``remat``, ``dtype`` (computed with),
        ``moments_dtype``, ``moments_memory``, ``query_block``, ``attn_implementation``, ``loss_chunks``, ``dropout``.
        To generate: ``batch`` rows, ``prompt`` tokens read at once, ``cache_length``, ``dtype``, ``cache_dtype``, and
        ``offload``: layers that come from the ``"host"``'s memory, or from ``"disk"`` at ``disk_bandwidth`` bytes/s
        (see `optjax.load_params`).

    Raises:
      ValueError: something is unknown, or does not fit together.
      ImportError: the slice's compiler is not installed; the message says what brings it.
      RuntimeError: the compiler failed, for something else than memory.
    """
    return run(make_request(size, topology, job, mesh=mesh, rules=rules, **options), save)


def run(request: Request, save: str | None = None) -> Plan:
    """Compiles what is asked."""
    rules = request.rules if isinstance(request.rules, str) else dict(request.rules)
    compiled, gathered = ask(
        request.config,
        request.topology,
        job=request.job,
        mesh=request.mesh,
        rules=rules,
        options=request.options,
        save=save,
    )
    return assemble(request, compiled, gathered)


def assemble(request: Request, compiled: list[Compiled], gathered: int = 0) -> Plan:
    """A plan from what the compiler said."""
    works, disk = request.works(), request.options.get("disk_bandwidth")
    steps = {}
    for each in compiled:
        rates = roofline(request.topology, works[each.name], each.interconnect, disk)
        steps[each.name] = Step(works[each.name], each, rates)
    return Plan(request, steps, gathered)


def from_dict(data: Mapping[str, Any], config: OPTConfig | None = None) -> Plan:
    """A plan from `Plan.to_dict`, without compiling again; ``config`` where the size was a custom one."""
    request = make_request(
        config or data["size"], data["topology"], data["job"], mesh=data["mesh"] if data["devices"] > 1 else "data=1",
        rules=data["rules"], **data["options"],
    )  # fmt: skip
    compiled = [from_json(step["compiled"]) for step in data["steps"].values()]
    return assemble(request, compiled, data["gathered_whole"])
