"""Plans: what a size needs on a slice, said by the compiler of that slice, before the slice is rented."""

from .hardware import CHIPS, Chip, Topology, parse_topology
from .planning import Plan, Step, plan
from .search import Found, search

__all__ = ["CHIPS", "Chip", "Found", "Plan", "Step", "Topology", "parse_topology", "plan", "search"]
