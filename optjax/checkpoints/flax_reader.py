"""Flax's msgpack files: nested maps whose leaves are arrays, walked without reading the arrays.

Arrays are msgpack extensions of type 1 that hold ``[shape, dtype name, bytes]`` (flax.serialization); arrays of more
than 2^30 bytes are cut into chunks that stand in a map of their own.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.bytes_reader import BytesReader
from optjax.checkpoints.errors import CheckpointError, reading, shorten
from optjax.checkpoints.tensors import MAX_DIMENSIONS, FileTensor, Joined, Reshaped, TensorRef

MAX_DEPTH = 32
MAX_SMALL = 100_000  # Bytes of a name or another value that is no array.
CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _SCALAR = 1, 3


def read_flax(path: Path) -> dict[str, TensorRef]:
    """The arrays of one file under names such as ``model/decoder/layers/0/fc1/kernel``; none of them read yet.

    Raises:
      CheckpointError: it is no msgpack, or something in it is neither a map nor an array.
    """
    with reading(path), BytesReader(path) as file:
        tree = _value(file, 0)
        if not isinstance(tree, dict):
            raise CheckpointError(f"{path} should hold a map of parameters")
        tensors: dict[str, TensorRef] = {}
        _flatten(tree, "", tensors)
    return tensors


def _flatten(node: dict[str, Any], prefix: str, out: dict[str, TensorRef]) -> None:
    for key, value in node.items():
        if isinstance(value, TensorRef):
            out[prefix + key] = value
        elif isinstance(value, dict) and CHUNKED in value:
            out[prefix + key] = _unchunk(value)
        elif isinstance(value, dict):
            _flatten(value, f"{prefix}{key}/", out)


def _unchunk(node: dict[str, Any]) -> TensorRef:
    shape = tuple(node["shape"][str(i)] for i in range(len(node["shape"])))
    chunks = tuple(node["chunks"][str(i)] for i in range(len(node["chunks"])))
    if not chunks or not all(isinstance(c, TensorRef) and len(c.shape) == 1 for c in chunks):
        raise CheckpointError("a chunked array has no chunks")
    joined = Joined(chunks)
    if not _is_shape(shape) or math.prod(shape) != joined.shape[0] or len({c.dtype for c in chunks}) > 1:
        raise CheckpointError("the chunks of an array do not add up to it")
    return Reshaped(joined, 0, shape)


def _is_shape(shape: Any) -> bool:
    return len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 62 for n in shape)


@dataclass(frozen=True)
class _Bytes:
    """Where a byte string lies."""

    start: int
    length: int


def _value(file: BytesReader, depth: int) -> Any:
    """The next msgpack value: dict, list, str, number, `_Bytes` or `TensorRef`."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"more than {MAX_DEPTH} levels of nesting")
    tag = file.uint(1)
    if tag <= 0x7F:
        return tag
    if tag <= 0x8F:
        return _map(file, tag & 0x0F, depth)
    if tag <= 0x9F:
        return [_value(file, depth + 1) for _ in range(tag & 0x0F)]
    if tag <= 0xBF:
        return _text(file, tag & 0x1F)
    if tag >= 0xE0:
        return tag - 0x100
    match tag:
        case 0xC0:
            return None
        case 0xC2 | 0xC3:
            return tag == 0xC3
        case 0xC4 | 0xC5 | 0xC6:
            length = file.uint(1 << (tag - 0xC4))
            start = file.position
            file.skip(length)
            return _Bytes(start, length)
        case 0xC7 | 0xC8 | 0xC9:
            return _extension(file, file.uint(1 << (tag - 0xC7)), depth)
        case 0xCA:
            return struct.unpack(">f", file.take(4))[0]
        case 0xCB:
            return struct.unpack(">d", file.take(8))[0]
        case 0xCC | 0xCD | 0xCE | 0xCF:
            return file.uint(1 << (tag - 0xCC))
        case 0xD0 | 0xD1 | 0xD2 | 0xD3:
            return int.from_bytes(file.take(1 << (tag - 0xD0)), "big", signed=True)
        case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
            return _extension(file, 1 << (tag - 0xD4), depth)
        case 0xD9 | 0xDA | 0xDB:
            return _text(file, file.uint(1 << (tag - 0xD9)))
        case 0xDC | 0xDD:
            return [_value(file, depth + 1) for _ in range(file.uint(2 if tag == 0xDC else 4))]
        case 0xDE | 0xDF:
            return _map(file, file.uint(2 if tag == 0xDE else 4), depth)
    raise CheckpointError(f"byte {tag:#x} at {file.position - 1} is no msgpack")


def _text(file: BytesReader, length: int) -> str:
    if length > MAX_SMALL:
        raise CheckpointError(f"a name of {length} bytes")
    return file.take(length).decode("utf-8", errors="replace")


def _map(file: BytesReader, count: int, depth: int) -> dict[str, Any]:
    out = {}
    for _ in range(count):
        key = _value(file, depth + 1)
        if not isinstance(key, str):
            raise CheckpointError(f"a name that is no text at byte {file.position}")
        if key in out:
            raise CheckpointError(f"the name {shorten(key)!r} twice in one map")
        out[key] = _value(file, depth + 1)
    return out


def _extension(file: BytesReader, length: int, depth: int) -> Any:
    kind = file.uint(1)
    end = file.position + length
    if end > file.size:
        raise CheckpointError(f"an array ends at byte {end}, but the file has {file.size}: it is truncated")
    if kind not in (_ARRAY, _SCALAR):
        file.seek(end)
        return None
    value = _value(file, depth + 1)
    if file.position != end or not isinstance(value, list) or len(value) != 3:
        raise CheckpointError(f"an array before byte {end} has no shape, dtype and bytes")
    shape, name, data = value
    if isinstance(name, _Bytes) and name.length < 32:  # Files of older versions have names as bytes.
        file.seek(name.start)
        name = file.take(name.length).decode("ascii", errors="replace")
        file.seek(end)
    if not isinstance(shape, list) or not _is_shape(shape) or not isinstance(data, _Bytes):
        raise CheckpointError(f"an array before byte {end} has an impossible shape")
    dtype = np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(str(name)).newbyteorder("<")
    if dtype.kind not in "fiub" and dtype != jnp.bfloat16:
        raise CheckpointError(f"an array before byte {end} holds {dtype}, not numbers")
    tensor = FileTensor(file.path, data.start, tuple(shape), dtype)
    if tensor.nbytes != data.length:
        raise CheckpointError(f"an array of shape {tensor.shape} and dtype {dtype} cannot have {data.length} bytes")
    return tensor
