"""The shapes of the decoding programs that are compiled for TPU and GPU, and what is read from what comes of them."""

from __future__ import annotations

import re
from typing import Any

from optjax.sharding.plan.hlo import parse
from optjax.sharding.plan.loops import runs

ROWS, COLUMNS, LAYERS, D = 8, 2048, 2, 2048
BUFFER, IN_HEADS = f"{ROWS},{COLUMNS},{D}", f"{ROWS},32,{COLUMNS},64"
# A buffer in bfloat16.
BUFFER_BYTES = ROWS * COLUMNS * D * 2


def report(compiled: Any, body_of_loop: bool = False) -> dict[str, int]:
    """What the tests ask of a program. Cycles are those of its straight part: loops would count once."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    computations = re.split(r"\n(?=\S[^\n]*\{\n)", text)
    entry = next(part for part in computations if part.startswith("ENTRY"))
    part = entry
    if body_of_loop:
        loops = [line for line in entry.splitlines() if " while(" in line]
        [loop] = [line for line in loops if BUFFER in line or IN_HEADS in line]
        name = re.search(r"body=(%[\w.]+)", loop)
        assert name is not None
        part = next(part for part in computations if part.startswith(name[1] + " "))
    made = (f"bf16[{BUFFER}]", f"s8[{BUFFER}]", f"s8[{IN_HEADS}]", f"bf16[{IN_HEADS}]")
    lines = [line for line in part.splitlines() if any(shape in line.split("(")[0] for shape in made)]
    return {
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "copies": sum(re.search(r"\b(copy|transpose)\(", line) is not None for line in lines),
        "kernels": sum(" custom-call(" in line and "decode_attention" in line for line in part.splitlines()),
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        "bfloat16 maxima": len(re.findall(rf"= \(bf16\[{ROWS}\]\S* s32\[{ROWS}\]\S*\) (?:reduce|fusion)\(", text)),
    }


def launches(compiled: Any) -> int:
    """The operations that one run of a program starts, those of its loops as often as they are run."""
    module = parse(compiled.as_text())
    called = {name for each in module.computations.values() for i in each.instructions.values() for name in _fused(i)}
    nothing = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"}
    return sum(
        times * sum(each.opcode not in nothing for each in module.computations[name].instructions.values())
        for name, times in runs(module).items()
        if name in module.computations and name not in called
    )


def _fused(instruction: Any) -> tuple[str, ...]:
    return instruction.calls if instruction.opcode == "fusion" else ()


def check_codes(codes: dict[str, int], floats: dict[str, int]) -> None:
    """An int8 cache is read as it is, with no copy in full precision: nothing of a buffer's size is made but by the
    writes in place; and of half the bytes."""
    assert codes["temporary"] < 0.1 * BUFFER_BYTES and codes["copies"] == 0
    assert codes["aliased"] >= codes["cache"]
    assert codes["cache"] <= 0.55 * floats["cache"]
    saved = floats["arguments"] - codes["arguments"]
    assert abs(saved - (floats["cache"] - codes["cache"])) < 0.01 * saved
