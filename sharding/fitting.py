"""Which placements fit a model: every weight's dimensions divide, and no mesh axis splits two of them."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import AxisType, Mesh

from optjax.config import OPTConfig
from optjax.declaration import Axis, declare
from optjax.sharding.mesh import AXES, format_mesh
from optjax.sharding.placement import Placement
from optjax.sharding.rules import Rules, as_rules


def make_placement(
    mesh: Mesh | None, rules: str | Rules | None, config: OPTConfig, head: str | None
) -> Placement | None:
    """A placement that fits every weight of a model; None where there is no mesh.

    Raises:
      ValueError: rules that make no sense (see `as_rules`), rules without a mesh, a weight of which one mesh axis
        splits two dimensions, or a dimension that does not divide; the message names the weight and the meshes that
        would work.
    """
    if mesh is None:
        if rules is not None:
            raise ValueError("rules say how weights are spread over a mesh: pass mesh= too")
        return None
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh should be a jax.sharding.Mesh such as make_mesh gives, not {type(mesh).__name__}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        # jax.make_mesh makes Explicit axes, under which a constraint is an assertion.
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    placement = Placement(mesh, as_rules(rules, mesh))
    found = misfit(placement, config, head)
    if found is not None:
        raise ValueError(f"{found}; {that_work(placement, config, head)}")
    return placement


def misfit(placement: Placement, config: OPTConfig, head: str | None) -> str | None:
    """What is wrong with a placement for a model; None if nothing is."""
    for weight in declare(config, head):
        seen: dict[str, str | None] = {}
        for size, axis in zip(weight.shape, weight.axes, strict=True):
            parts = axis if isinstance(axis, tuple) else (axis,)
            for part in parts:
                for name in placement.mesh_axes(part):
                    if name in seen:
                        both = f"{seen[name]!r} and {part!r}"
                        return f"{weight.path} {weight.shape}: mesh axis {name!r} splits both {both}"
                    seen[name] = part
            if "heads" in parts and config.num_attention_heads % placement.shards("heads"):
                axis, size = "heads", config.num_attention_heads
            if size % placement.shards(axis):
                named = " and ".join(axis) if isinstance(axis, tuple) else axis
                return f"{weight.path} {weight.shape}: {named} = {size} does not divide into {_named(placement, axis)}"
    return None


def _named(placement: Placement, axis: Axis) -> str:
    return " × ".join(f"{name}={placement.mesh.shape[name]}" for name in placement.mesh_axes(axis))


def that_work(placement: Placement, config: OPTConfig, head: str | None) -> str:
    """The meshes of as many devices that fit, in words."""
    n, mesh = placement.mesh.size, placement.mesh
    if tuple(mesh.axis_names) != tuple(AXES):
        return "choose other sizes of the mesh, or None for that axis in the rules"
    own = format_mesh(mesh)
    used = {name for _, names in placement.rules for name in names}
    if mesh.shape["sequence"] == 1:
        used.discard("sequence")
    fits = []
    for sizes in meshes(n, tuple(name for name in AXES if name in used)):
        other: Any = MeshShape(sizes)
        if format_mesh(sizes) != own and misfit(Placement(other, placement.rules), config, head) is None:
            fits.append(format_mesh(sizes))
    if not fits:
        return f"no mesh of {n} devices fits these rules"
    return f"meshes of {n} devices that work: {'; '.join(fits[:6])}{' …' if len(fits) > 6 else ''}"


class MeshShape(dict[str, int]):
    """As much of a mesh as can be known without devices."""

    @property
    def shape(self) -> dict[str, int]:
        return self

    @property
    def size(self) -> int:
        return math.prod(self.values())

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self)


def meshes(devices: int, axes: tuple[str, ...] = tuple(AXES)) -> list[dict[str, int]]:
    """Every mesh of so many devices over some of the axes; the largest ``tensor`` first."""

    def split(n: int, names: tuple[str, ...]) -> list[dict[str, int]]:
        if not names:
            return [{}] if n == 1 else []
        found = []
        for size in range(n, 0, -1):
            if n % size == 0:
                found += [{**rest, names[-1]: size} for rest in split(n // size, names[:-1])]
        return found

    return [{**dict.fromkeys(AXES, 1), **sizes} for sizes in split(devices, axes)]
