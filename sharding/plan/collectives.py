"""The collectives of a compiled program: what is sent, between which devices, and how often.

They come plain (``all-reduce``), in two halves (``all-reduce-start``, ``all-reduce-done``), wrapped (``async-start``
and a computation), and on TPU inside fusions: of an all-reduce and what takes a part of it, which is a reduce-scatter;
or of what starts and what finishes a collective. Each counts once for each time it is carried out.

The compiler may turn a gather or a scatter beside a matrix product into a ring of ``collective-permute``, each part of
which is multiplied while the next one travels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .groups import axes_of, first_group
from .hlo import Computation, Instruction, Module, parse, parts, size
from .loops import runs

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: of `KINDS`.
      bytes: on a device, each time: of an all-gather's result, a reduce-scatter's operand, else of the buffer.
      count: how often a run of the program carries it out.
      axes: the mesh axes that the devices of a group differ in, in the mesh's order.
      group: the first group of devices, as positions in the mesh's flat order.
      shapes: of the arrays that `bytes` counts, ``bf16[8,2048]``.
      name: of the instruction, and op_name: where in the program it comes from.
      overlapped: whether it is started and finished apart, with work between.
    """

    kind: str
    bytes: int
    count: int
    axes: tuple[str, ...]
    group: tuple[int, ...]
    shapes: tuple[str, ...]
    name: str
    op_name: str
    overlapped: bool

    @property
    def total(self) -> int:
        """Bytes on a device in one run of the program."""
        return self.bytes * self.count


def collectives(text: str | Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Those of a program's text, in its order.

    Args:
      mesh: size of each axis, in order: ``dict(jax_mesh.shape)``.

    Raises:
      ValueError: the text is no program, or groups of devices are written in a way that is not known here.
    """
    module = text if isinstance(text, Module) else parse(text)
    count = runs(module)
    halves = _halves(module)
    found: dict[str, Collective] = {}
    for computation in module.computations.values():
        for each in computation.instructions.values() if count[computation.name] else ():
            kind = _kind(each)
            devices = first_group(each.attributes, mesh) if kind else ()
            if kind is None or len(devices) < 2:
                continue
            shapes = _moved(kind, each, computation.instructions)
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            # Fusions that start, accompany and finish one collective each repeat it, under its channel.
            key = (
                f"channel {channel[1]}" if channel and computation.name in halves else f"{computation.name} {each.name}"
            )
            found.setdefault(
                key,
                Collective(
                    kind="reduce-scatter" if kind == "all-reduce" and _scattered(each, computation) else kind,
                    bytes=sum(map(size, shapes)),
                    count=count[computation.name],
                    axes=axes_of(devices, mesh),
                    group=devices,
                    shapes=tuple(re.sub(r"\{.*?\}", "", shape) for shape in shapes),
                    name=each.name,
                    op_name=_op_name(each) or _op_name(halves.get(computation.name)),
                    overlapped=each.opcode.endswith("-start") or _is_async(halves.get(computation.name)),
                ),
            )
    return list(found.values())


def _halves(module: Module) -> dict[str, Instruction]:
    """Computations that are part of one instruction, a fusion or the start of something asynchronous, with it."""
    return {
        name: each
        for computation in module.computations.values()
        for each in computation.instructions.values()
        if each.opcode in ("fusion", "async-start")
        for name in each.calls
    }


def _is_async(instruction: Instruction | None) -> bool:
    return instruction is not None and ("async" in instruction.name or instruction.opcode == "async-start")


def _kind(instruction: Instruction) -> str | None:
    name = instruction.opcode.removesuffix("-start")
    return {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}.get(
        name, name if name in KINDS else None
    )


def _moved(kind: str, each: Instruction, others: Mapping[str, Instruction]) -> list[str]:
    """The shapes that count."""
    if kind == "reduce-scatter":
        operands = [others[name].shape for name in each.operands if name in others]
        return [part for shape in operands for part in parts(shape)]
    shapes = parts(each.shape)
    if each.opcode in ("all-gather-start", "all-to-all-start", "collective-permute-start"):
        # (operand, result, …) or ((operands), (results), …)
        return parts(shapes[1])
    return shapes


def _scattered(each: Instruction, computation: Computation) -> bool:
    """Whether an all-reduce is half of a reduce-scatter: on TPU, a fusion of it and of taking one's own part."""
    users = [other for other in computation.instructions.values() if each.name in other.operands]
    return computation.name.startswith("all-reduce-scatter") and all(user.opcode == "dynamic-slice" for user in users)


def _op_name(instruction: Instruction | None) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes if instruction else "")
    return found[1] if found else ""
