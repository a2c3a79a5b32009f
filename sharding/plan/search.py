"""Searching for the mesh, rules and levers of a job on a slice.

What fits is known for certain by compiling alone, which takes a minute for a large model. So all combinations are
estimated from the config first: those whose analytic minimum is more than the memory are left out, and the others
compiled in the order of their estimated time, those that probably fit first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from optjax.config import OPTConfig
from optjax.sharding.fitting import meshes
from optjax.sharding.mesh import AXES
from optjax.sharding.rules import LOGICAL_AXES

from .estimate import estimate, memory
from .hardware import Topology, parse_topology
from .planning import Plan, run
from .request import Request, make_request

RULE_SETS = ("fsdp+tensor+sequence", "fsdp+tensor", "data")
REMAT = ("none", "dots", "full")
# More tensor parallelism than this never pays, as its traffic comes at every layer.
MOST_TENSOR = 32
# Estimated times that differ by less than this fraction are as good as equal.
NEARLY = 0.03


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
      ranked: plans that fit, the fastest floor first.
      refused: plans that were compiled and do not fit, the nearest first.
      possible, hopeless: how many combinations make sense, and how many of these cannot fit.
    """

    ranked: list[Plan]
    refused: list[Plan]
    possible: int
    hopeless: int

    @property
    def tried(self) -> int:
        """How many combinations were compiled."""
        return len(self.ranked) + len(self.refused)


def search(
    size: str | OPTConfig,
    topology: str | Topology,
    job: str = "train",
    *,
    limit: int = 8,
    on_progress: Callable[[int, int, Request | None], None] | None = None,
    **options: Any,
) -> Found:
    """Tries meshes, rules, remat policies and micro-batches; what ``options`` names stays as it is.

    Args:
      limit: how many combinations to compile at most.
      on_progress: called with the number compiled, the number to compile, and the next one (None at the end).
      **options: as of `plan`, ``mesh`` and ``rules`` among them.

    Raises:
      ValueError: as `plan`; or no combination makes sense.
    """
    topology = topology if isinstance(topology, Topology) else parse_topology(topology)
    possible = list(combinations(size, topology, job, **options))
    if not possible:
        make_request(size, topology, job, **options)  # whose error says why
        raise ValueError(f"no mesh of {topology.devices} devices suits this model and batch")
    hopeful = promising(possible)
    plans, left, off = [], list(hopeful), dict[Any, float]()
    while left and len(plans) < limit:
        # Where a remat policy's estimate proved too low, others of it are taken to be as far off.
        fits = (memory(r) * off.get(r.options.get("remat"), 1.0) <= topology.chip.capacity for r in left)
        request = left.pop(next((i for i, fit in enumerate(fits) if fit), 0))
        if on_progress:
            on_progress(len(plans), min(limit, len(hopeful)), request)
        made = run(request)
        plans.append(made)
        if not made.fits:
            remat = request.options.get("remat")
            off[remat] = max(off.get(remat, 1.0), made.peak / memory(request))
    if on_progress:
        on_progress(len(plans), len(plans), None)
    return Found(
        ranked=sorted((p for p in plans if p.fits), key=lambda p: (p.main.roofline.floor, p.main.roofline.total)),
        refused=sorted((p for p in plans if not p.fits), key=lambda p: -p.spare),
        possible=len(possible),
        hopeless=len(possible) - len(hopeful),
    )


def combinations(size: str | OPTConfig, topology: Topology, job: str, **options: Any) -> Iterator[Request]:
    """Every request that makes sense, over all that ``options`` leave open; of those that split alike, the first."""
    given = {name: value for name, value in options.items() if value is not None and value != "auto"}
    rule_sets = [given.pop("rules")] if "rules" in given else RULE_SETS
    mesh = given.pop("mesh", None)
    seen = set()
    for rules in rule_sets:
        for each in [mesh] if mesh else _meshes(topology, rules, job):
            for levers in _levers(job, given):
                try:
                    request = make_request(size, topology, job, mesh=each, rules=rules, **given, **levers)
                except ValueError:
                    continue
                splits = request.splits
                alike = tuple(splits.mesh_axes(axis) for axis in LOGICAL_AXES)
                key = (alike, tuple(request.mesh.values()), tuple(request.options.values()))
                if key not in seen:
                    seen.add(key)
                    yield request


def promising(requests: list[Request]) -> list[Request]:
    """Those whose analytic minimum is within the memory: what probably fits first, of it the fastest first; of those
    whose floors are as good as equal, what has the most to spare besides."""
    capacity = requests[0].topology.chip.capacity

    def key(request: Request) -> tuple[bool, int, float]:
        times = estimate(request)
        return memory(request) > capacity, round(math.log(times.floor) / NEARLY), times.total

    return sorted((each for each in requests if least(each) <= capacity), key=key)


def _meshes(topology: Topology, rules: Any, job: str) -> Iterator[dict[str, int]]:
    """All devices over the data; or, for the other rule sets, over tensor as far as it pays and the rest over fsdp; to
    generate, over copies too, that send nothing to each other."""
    if rules == "data":
        yield dict.fromkeys(AXES, 1) | {"data": topology.devices}
        return
    per_slice = topology.devices // topology.slices
    most = topology.chip.devices_per_host if topology.chip.platform == "gpu" else min(MOST_TENSOR, per_slice)
    for mesh in meshes(per_slice, ("fsdp", "tensor") if job == "train" else ("data", "fsdp", "tensor")):
        if mesh["tensor"] <= most:
            yield mesh | {"data": mesh["data"] * topology.slices}


def _levers(job: str, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What else is tried of a training step: what it keeps, and in how many parts its batch is taken."""
    if job != "train":
        yield {}
        return
    for remat in (given["remat"],) if "remat" in given else REMAT:
        for parts in (given["micro_batches"],) if "micro_batches" in given else (2**i for i in range(12)):
            levers = {"remat": remat, "micro_batches": parts}
            yield {name: value for name, value in levers.items() if name not in given}


def least(request: Request) -> int:
    """The analytic minimum of a device's bytes."""
    return max(work.least_memory for work in request.works().values())
