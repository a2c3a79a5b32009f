"""A mesh for a size and a number of devices, by rules of thumb; ``optjax plan --search`` compiles and compares."""

from __future__ import annotations

from typing import Any

from optjax.config import OPTConfig
from optjax.declaration import count_params
from optjax.sharding.fitting import MeshShape, misfit
from optjax.sharding.mesh import parse_mesh
from optjax.sharding.placement import Placement
from optjax.sharding.rules import Rules, as_rules

JOBS = ("train", "generate")


def choose_mesh(
    config: OPTConfig,
    devices: int,
    job: str = "train",
    *,
    memory: float = 16e9,
    fast: int | None = None,
    rules: str | Rules | None = None,
) -> dict[str, int]:
    """The sizes of a mesh that suits a job.

    Training spreads over ``fsdp``, with as little ``tensor`` as leaves each device a row and room for the activations
    of one: every split of a layer costs traffic at every layer, and gathers of whole weights cost the same on any mesh.
    Generation spreads weights over ``tensor`` until they take half of the memory, and rows over ``data``: there each
    group of devices reads all weights again for its own rows. Where ``tensor`` cannot be wide enough for that, groups
    share the weights over ``fsdp``, until they take two thirds. What does not divide over all devices is spread over as
    many as it divides over, in copies over ``data``.

    Args:
      devices: how many there are.
      job: ``"train"`` or ``"generate"``.
      memory: bytes of a device.
      fast: the most devices with a fast network between them, such as a host's GPUs; all by default.
      rules: under which every weight divides, and each axis of the mesh is used; the default ones where they are None.

    Raises:
      ValueError: the number or the job makes no sense, or the rules (see `as_rules`).
    """
    if job not in JOBS:
        raise ValueError(f"no job {job!r}; there are: {', '.join(JOBS)}")
    if devices < 1:
        raise ValueError(f"a mesh has at least one device, not {devices}")
    copies_of_all = parse_mesh({"data": devices})
    as_rules(rules, _shape(copies_of_all))

    def fits(data: int, fsdp: int, tensor: int) -> bool:
        mesh = _shape(parse_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}))
        try:
            placement = Placement(mesh, as_rules(rules, mesh))
        except ValueError:  # an axis that no rule uses
            return False
        return misfit(placement, config, "causal_lm") is None

    splits = [n for n in _divisors(devices) if n <= (fast or devices) and fits(devices // n, 1, n)] or [1]
    if job == "generate":
        weights = 2 * count_params(config)  # bfloat16
        tensor = next((n for n in splits if 2 * weights <= n * memory), splits[-1])
        copies = devices // tensor
        shares = [n for n in _divisors(copies) if fits(copies // n, n, tensor)] or [1]
        fsdp = next((n for n in shares if 1.5 * weights <= n * tensor * memory), shares[-1])
        return parse_mesh({"data": copies // fsdp, "fsdp": fsdp, "tensor": tensor})
    # What a row of full length keeps for the backward pass: the input of each layer, in bfloat16.
    kept = 2 * config.num_hidden_layers * config.max_position_embeddings * config.hidden_size
    for data in _divisors(devices):
        own = devices // data
        fitting = [n for n in splits if own % n == 0 and fits(data, own // n, n)]
        room = max(memory - 16 * count_params(config) / own, 0.1 * memory) / 4
        if fitting:
            tensor = next((n for n in fitting if kept <= n * room), fitting[-1])
            return parse_mesh({"data": data, "fsdp": own // tensor, "tensor": tensor})
    return copies_of_all


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _shape(sizes: dict[str, int]) -> Any:
    return MeshShape(sizes)
