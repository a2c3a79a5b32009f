"""Writes safetensors, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

from optjax.checkpoints.entries import Entry

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


def write_safetensors(out: BinaryIO, entries: Sequence[Entry]) -> None:
    """The header, then the tensors in order.

    Raises:
      ValueError: a tensor is neither floating point nor int8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so.
    at = 0
    for entry in entries:
        if entry.dtype.name not in _TYPES:
            raise ValueError(f"{entry.name} is {entry.dtype.name}; weights are saved as floating point or int8")
        kind = _TYPES[entry.dtype.name]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors start at a multiple of 8, as the reference implementation aligns them.
    out.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        out.write(entry.raw())
