"""Plans: what a size needs on a slice, said by the compiler of that slice, before the slice is rented."""

from .cycles import Operation, estimated_cycles
from .devices import ENVIRONMENT, check_compiler
from .devices import devices as described_devices
from .hardware import CHIPS, Chip, Topology, parse_topology
from .planning import Plan, Step, plan
from .request import Request, make_request
from .search import Found, search

__all__ = [
    "CHIPS",
    "ENVIRONMENT",
    "Chip",
    "Found",
    "Operation",
    "Plan",
    "Request",
    "Step",
    "Topology",
    "check_compiler",
    "described_devices",
    "estimated_cycles",
    "make_request",
    "parse_topology",
    "plan",
    "search",
]
