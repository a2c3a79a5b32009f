"""How often each computation of a compiled program runs: loops count their body once, whatever their trip count."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .hlo import Computation, Instruction, Module


def runs(module: Module) -> Counter[str]:
    """How often each computation runs in one run of the program. Of a conditional's branches, each counts."""
    count: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        count[name] += times
        computation = module.computations.get(name)
        for each in computation.instructions.values() if computation else ():
            # Of the halves of an async operation, the first one runs it.
            if each.opcode in ("async-update", "async-done"):
                continue
            inner = times * trip_count(module, name, each) if each.opcode == "while" else times
            for called in each.calls:
                visit(called, inner)

    visit(module.entry, 1)
    return count


def trip_count(module: Module, computation: str, loop: Instruction) -> int:
    """Of a while loop: as the compiler notes it, else read from ``i < n`` in its condition; 1 where nothing says it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations.get(loop.condition or "")
    body = module.computations.get(loop.calls[0]) if loop.calls else None
    start = module.computations[computation].instructions.get(loop.operands[0]) if loop.operands else None
    if condition is None or body is None or start is None:
        return 1
    compared = _comparison(module, condition)
    if compared is None:
        return 1
    direction, left, right = compared
    outside = _Scalars(module, module.computations[computation])

    def initial(instruction: Instruction | None) -> int | None:
        """A number in the condition: a constant, or what the loop was started with."""
        value = _Scalars(module, condition).of(instruction)
        if value is None and instruction is not None:
            index = _tuple_index(condition, instruction)
            if index is not None and start.opcode == "tuple":
                value = outside.of(module.computations[computation].instructions.get(start.operands[index]))
        return value

    first, last = initial(left), initial(right)
    index = _tuple_index(condition, left)
    step = _step(module, body, index) if index is not None else None
    if first is None or last is None or not step:
        # The usual loop counts up from 0 by 1.
        return max(1, last) if last is not None and direction in ("LT", "NE") else 1
    distance = (last - first) + (step // abs(step) if direction in ("LE", "GE") else 0)
    return max(0, -(-distance // step))


def _comparison(module: Module, condition: Computation) -> tuple[str, Instruction | None, Instruction | None] | None:
    """Direction and both sides of the comparison that a condition returns, seen through a fusion."""
    root = condition.root
    if root.opcode == "compare":
        a, b = (condition.instructions.get(name) for name in root.operands[:2])
        return _direction(root), a, b
    if root.opcode == "fusion" and root.calls:
        inner = module.computations.get(root.calls[0])
        if inner is None or inner.root.opcode != "compare":
            return None
        sides = []
        for name in inner.root.operands[:2]:
            each = inner.instructions.get(name)
            if each is not None and each.opcode == "parameter":
                each = condition.instructions.get(root.operands[int(each.literal)])
            sides.append(each)
        return _direction(inner.root), sides[0], sides[1]
    return None


def _direction(compare: Instruction) -> str:
    found = re.search(r"direction=(\w+)", compare.attributes)
    return found[1] if found else ""


@dataclass(frozen=True)
class _Scalars:
    """Integers that a computation's instructions stand for."""

    module: Module
    computation: Computation

    def of(self, instruction: Instruction | None) -> int | None:
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
            instruction = self.computation.instructions.get(instruction.operands[0])
        if instruction is None or instruction.opcode != "constant":
            return None
        number = re.fullmatch(r"\s*(-?\d+)\s*", instruction.literal)
        return int(number[1]) if number else None


def _tuple_index(computation: Computation, instruction: Instruction | None) -> int | None:
    """Which element of the computation's parameter an instruction is."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.instructions.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a loop's body adds to an element of its tuple."""
    root = body.root
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    add, where = body.instructions.get(root.operands[index]), body
    while add is not None and add.opcode in ("copy", "bitcast"):
        add = where.instructions.get(add.operands[0])
    constants = []
    if add is not None and add.opcode == "fusion" and add.calls:
        constants = [_Scalars(module, body).of(body.instructions.get(name)) for name in add.operands]
        where = module.computations.get(add.calls[0], body)
        add = where.root
    if add is None or add.opcode != "add":
        return None
    constants += [_Scalars(module, where).of(where.instructions.get(name)) for name in add.operands]
    found = [value for value in constants if value is not None]
    return found[0] if len(found) == 1 else None
