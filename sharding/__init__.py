"""Meshes, rules and placement of OPT parameters over many devices."""

from optjax.sharding.choose import choose_mesh
from optjax.sharding.distributed import initialize
from optjax.sharding.fitting import make_placement, meshes
from optjax.sharding.mesh import AXES, format_mesh, make_mesh, parse_mesh
from optjax.sharding.overlap import compile_overlapped, overlap_options
from optjax.sharding.placement import Placement
from optjax.sharding.rules import LOGICAL_AXES, RULES

__all__ = [
    "AXES",
    "LOGICAL_AXES",
    "RULES",
    "Placement",
    "choose_mesh",
    "compile_overlapped",
    "format_mesh",
    "initialize",
    "make_mesh",
    "make_placement",
    "meshes",
    "overlap_options",
    "parse_mesh",
]
