"""What ``torch.save`` writes (.bin, .pt), without torch: a pickle of descriptions, and the tensors' bytes beside it."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.errors import CheckpointError, reading, shorten
from optjax.checkpoints.tensors import MAX_DIMENSIONS, FileTensor, TensorRef
from optjax.checkpoints.unpickle import MAX_BYTES, PickledTensor, Storage, unpickle

DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_WRAPPERS = ("state_dict", "model", "module")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # First object of a file from before torch 1.6.

ToRef = Callable[[PickledTensor], FileTensor]


def read_torch(path: Path) -> dict[str, TensorRef]:
    """The tensors of a state dict by name; none of them read yet.

    Raises:
      CheckpointError: no file of ``torch.save``, no state dict in it, or a pickle that asks for anything but tensors.
    """
    content, to_ref = open_torch(path)
    with reading(path):
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} should hold a dictionary of tensors")
        # As training programs save them, beside an optimizer's state or alone.
        inner = [content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)]
        if len(inner) == 1 and not any(isinstance(v, PickledTensor) for v in content.values()):
            content = inner[0]
        return {k: to_ref(v) for k, v in content.items() if isinstance(k, str) and isinstance(v, PickledTensor)}


def open_torch(path: Path) -> tuple[Any, ToRef]:
    """What was pickled, as plain data, and the function that finds a `PickledTensor` of it in the file."""
    with reading(path):
        with open(path, "rb") as file:
            start = file.read(4)
        return _open_zip(path) if start == b"PK\x03\x04" else _open_legacy(path)


def _open_zip(path: Path) -> tuple[Any, ToRef]:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        names = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(names) != 1:
            raise CheckpointError(f"{path} is a zip, but not one of torch.save: it has {len(names)} data.pkl")
        prefix = names[0].removesuffix("data.pkl")
        info = entries[names[0]]
        # Stored, not compressed, is what torch writes; and it leaves no room for zip bombs.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(size, MAX_BYTES):
            raise CheckpointError(f"{path}: data.pkl is compressed, or larger than {MAX_BYTES} bytes")
        content, _ = unpickle(archive.read(info))
        if f"{prefix}byteorder" in entries and archive.read(entries[f"{prefix}byteorder"])[:8] != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported")

    def locate(storage: Storage) -> tuple[int, int]:
        entry = entries.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise CheckpointError(f"{path} has no entry for storage {shorten(storage.key)!r}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: storage {shorten(storage.key)!r} is compressed, as torch never does")
        with open(path, "rb") as file:
            file.seek(entry.header_offset)
            local = file.read(30)
        if local[:4] != b"PK\x03\x04" or len(local) < 30:
            raise CheckpointError(f"{path}: storage {shorten(storage.key)!r} is not where the directory says")
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > size:
            raise CheckpointError(f"{path} is truncated: it ends within storage {shorten(storage.key)!r}")
        return start, entry.file_size

    return content, _finder(path, locate)


def _open_legacy(path: Path) -> tuple[Any, ToRef]:
    """Five pickles (magic, protocol, system, content, storage keys), then each storage's length and bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES)
    try:
        magic, at = unpickle(data)
    except CheckpointError:
        magic, at = None, 0
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is not a file of torch.save (neither its zip nor its older layout)")
    _, at = unpickle(data, at)
    _, at = unpickle(data, at)
    content, at = unpickle(data, at)
    keys, at = unpickle(data, at)
    del data
    kinds = {tensor.storage.key: tensor.storage for tensor in _tensors(content)}
    places: dict[str, tuple[int, int]] = {}
    with open(path, "rb") as file:
        for key in keys:
            file.seek(at)
            length = int.from_bytes(file.read(8), "little")
            if key not in kinds:
                raise CheckpointError(
                    f"{path}: storage {shorten(str(key))!r} belongs to no tensor, so its size is unknown"
                )
            nbytes = length * _dtype(kinds[key]).itemsize
            if at + 8 + nbytes > size:
                raise CheckpointError(f"{path} is truncated: it ends within storage {shorten(str(key))!r}")
            places[key] = (at + 8, nbytes)
            at += 8 + nbytes

    def locate(storage: Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise CheckpointError(f"{path} has no bytes for storage {shorten(storage.key)!r}")
        return places[storage.key]

    return content, _finder(path, locate)


def _tensors(content: Any, limit: int = 1_000_000):
    """Every tensor in nested containers, each container once, without recursion."""
    seen, waiting = set(), [content]
    while waiting and len(seen) < limit:
        node = waiting.pop()
        if isinstance(node, PickledTensor):
            yield node
        elif isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            waiting.extend(node.values() if isinstance(node, dict) else node)


def _dtype(storage: Storage) -> np.dtype:
    if storage.kind not in DTYPES:
        raise CheckpointError(f"a tensor of unsupported type {shorten(storage.kind)!r}")
    return DTYPES[storage.kind]


def _finder(path: Path, locate: Callable[[Storage], tuple[int, int]]) -> ToRef:
    def find(tensor: PickledTensor) -> FileTensor:
        start, nbytes = locate(tensor.storage)
        dtype = _dtype(tensor.storage)
        if len(tensor.shape) > MAX_DIMENSIONS:
            raise CheckpointError(f"{path} holds a tensor of {len(tensor.shape)} dimensions")
        ref = FileTensor(path, start + tensor.offset * dtype.itemsize, tensor.shape, dtype, _odd_strides(tensor))
        # A tensor larger than its storage repeats itself (stride 0): no weight does, and it could be of any size.
        held = nbytes // dtype.itemsize
        if tensor.offset + ref.span > held or math.prod(tensor.shape) > held:
            raise CheckpointError(
                f"{path}: a tensor of shape {tensor.shape} does not fit into its storage of {held} elements"
            )
        return ref

    return find


def _odd_strides(tensor: PickledTensor) -> tuple[int, ...] | None:
    """The strides, or None where they are those of C order (dimensions of one element do not count)."""
    expected = 1
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if n != 1 and stride != expected:
            return None if 0 in tensor.shape else tensor.strides
        expected *= n
    return None
