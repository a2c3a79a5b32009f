"""A mesh and micro-batches for the devices at hand, where the settings leave them open."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from optjax.config import OPTConfig
from optjax.sharding.mesh import format_mesh
from optjax.sharding.plan.estimate import memory
from optjax.sharding.plan.here import topology_here
from optjax.sharding.plan.request import make_request

from .options import StepOptions


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` chose.

    Attributes:
      mesh: as `optjax.sharding.make_mesh` takes it; None on one device.
      micro_batches: parts of a batch.
      needed, capacity: bytes of a device, by estimate (off by up to a tenth; `optjax plan` asks the compiler), and what
        it has.
    """

    mesh: str | None
    micro_batches: int
    needed: float
    capacity: int


def fit(
    config: OPTConfig,
    options: StepOptions,
    *,
    batch_size: int,
    length: int,
    mesh: str | None = None,
    rules: Any = None,
    micro_batches: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Fit:
    """Leaves a mesh or micro-batches that are given as they are; chooses the others as `optjax plan` does.

    Args:
      devices: all of the run by default.

    Raises:
      ValueError: the model or the batch does not divide over the devices; the message has what would.
    """
    here = topology_here(devices)
    asked = {
        name: getattr(options, name)
        for name in ("dtype", "remat", "query_block", "attn_implementation", "loss_chunks")
        + ("moments_dtype", "moments_memory")
    }
    request = make_request(
        config,
        here,
        "train",
        mesh=mesh,
        rules=rules,
        batch=batch_size,
        length=length,
        micro_batches=micro_batches,
        **asked,
    )
    single = here.devices == 1 and mesh is None
    chosen = request.options["micro_batches"]
    return Fit(None if single else format_mesh(request.mesh), chosen, memory(request), here.chip.capacity)
