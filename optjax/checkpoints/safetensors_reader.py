"""safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.errors import CheckpointError, reading, shorten
from optjax.checkpoints.tensors import MAX_DIMENSIONS, FileTensor, TensorRef

MAX_HEADER = 100_000_000  # The limit of the reference implementation.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """The tensors of one file by name; none of them read yet.

    Raises:
      CheckpointError: the header is broken, or a tensor's bytes are not where it says.
    """
    with reading(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise CheckpointError(f"{path} is no complete safetensors file: {size} bytes, a header of {length}")
            if length > MAX_HEADER:
                raise CheckpointError(f"{path} claims a header of {length} bytes; at most {MAX_HEADER} are allowed")
            text = file.read(length)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: the header should be a JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
        _refuse_overlaps(path, tensors)
    return dict(tensors)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise CheckpointError("a name stands twice in the header")
    return out


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> FileTensor:
    where = f"{path}: {shorten(name)!r}"
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{where} should have a dtype, a shape and two data_offsets") from None
    if kind not in DTYPES:
        raise CheckpointError(f"{where} has the unknown dtype {shorten(str(kind))!r}")
    numbers = [*shape, start, stop]
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise CheckpointError(f"{where} has an impossible shape or offsets")
    tensor = FileTensor(path, data + start, tuple(shape), DTYPES[kind])
    if tensor.nbytes != stop - start:
        raise CheckpointError(f"{where} of shape {tensor.shape} and dtype {kind} cannot have {stop - start} bytes")
    if data + stop > size:
        raise CheckpointError(f"{where} ends at byte {data + stop}, but the file has {size}: it is truncated")
    return tensor


def _refuse_overlaps(path: Path, tensors: dict[str, FileTensor]) -> None:
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: {shorten(name)!r} overlaps {shorten(before)!r}")
        end, before = tensor.offset + tensor.nbytes, name
