"""What the TPU compiler reckons each operation of a program to take."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .hlo import parse
from .loops import runs

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    Attributes:
      name: in the program's text.
      source: what it was in Python: scopes and the primitive, ``jit(f)/mlp/dot_general``; empty where it is unknown.
      shape: of its result, with layout.
      cycles: of all its runs together, by the compiler's own estimate.
      runs: how often it runs in one run of the program.
    """

    name: str
    source: str
    shape: str
    cycles: int
    runs: int


def estimated_cycles(text: str) -> list[Operation]:
    """The operations that a TPU program's text, ``compiled.as_text()``, has an estimate of; the dearest first.

    The estimate is for comparing programs, and for finding the operation that is wrong: it is not calibrated, for
    elementwise work up to three times too high, and copies that run beside other operations count nothing.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    module = parse(text)
    found = []
    for name, count in runs(module).items():
        computation = module.computations.get(name)
        for each in computation.instructions.values() if computation else ():
            cycles, source = _CYCLES.search(each.attributes), _SOURCE.search(each.attributes)
            if cycles:
                what = source[1].replace("\\'", "'") if source else ""
                found.append(Operation(each.name, what, each.shape, int(cycles[1]) * count, count))
    return sorted(found, key=lambda operation: -operation.cycles)
