"""Reading the text of a compiled program: computations of instructions, one a line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_WIDTHS: dict[str, float] = {"pred": 1, "bf16": 2}
_WIDTHS |= {f"{kind}{bits}": bits / 8 for kind in "suf" for bits in (1, 2, 4, 8, 16, 32, 64)}
_WIDTHS |= {"c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*->.*)?\{\s*$")
_END = re.compile(r"^\}(?:,|\s|$)")
_NAME = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:body|calls|true_computation|false_computation|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line: ``%name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs, but for a loop's condition and what reduces two numbers to one."""
        named = [] if self.opcode in _REDUCING else _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            named += [name.strip().lstrip("%") for name in group.split(",") if name.strip()]
        return tuple(named)

    @cached_property
    def condition(self) -> str | None:
        """A loop's condition."""
        found = re.search(r"\bcondition=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


# What these apply is a sum of two scalars or the like; `call` alone runs a whole computation by to_apply.
_REDUCING = {
    "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter", "all-reduce", "all-reduce-start",
    "reduce-scatter", "reduce-scatter-start",
}  # fmt: skip


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next((each for each in self.instructions.values() if each.root), list(self.instructions.values())[-1])


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Module:
    """The text of ``compiled.as_text()``.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _whole_lines(text):
        if line[:1] not in (" ", "\t"):
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
            elif _END.match(line):
                current = None
        elif current is not None:
            found = _instruction(line)
            if found is not None:
                current.instructions[found.name] = found
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Module(entry, computations)


def _whole_lines(text: str) -> Iterator[str]:
    """The lines, with those of which an attribute holds line breaks put together: a kernel's metadata may be JSON."""
    whole: list[str] = []
    for line in text.splitlines():
        if whole and whole[0][:1] in (" ", "\t") and line[:1] not in (" ", "\t", "") and not _END.match(line):
            whole.append(line)
            continue
        yield from [" ".join(whole)] if whole else []
        whole = [line]
    yield from [" ".join(whole)] if whole else []


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if name is None:
        return None
    start = name.end()
    # A shape is a tuple in parentheses, or an array: up to the first space outside of braces (layouts hold none).
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    inside, attributes = line[opcode.end() : close], line[close + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if not operands and opcode[1] not in ("constant", "parameter", "iota"):
        operands = tuple(part.split()[-1] for part in _split(inside) if part.strip())
    return Instruction(name[2], line[start:end], opcode[1], operands, inside, attributes, bool(name[1]))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _split(text: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def size(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple, as the program counts them: without a layout's padding."""
    total = 0.0
    for kind, dimensions in _ARRAY.findall(shape):
        n = math.prod(int(d.strip("<= ")) for d in dimensions.split(",")) if dimensions.strip() else 1
        total += n * (1 if kind.startswith("f8") else _WIDTHS.get(kind, 0))
    return int(total)


def parts(shape: str) -> list[str]:
    """The elements of a tuple's shape; of an array, itself."""
    shape = re.sub(r"/\*.*?\*/", "", shape).strip()
    return [part.strip() for part in _split(shape[1:-1])] if shape.startswith("(") else [shape]
