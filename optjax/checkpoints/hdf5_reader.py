"""TensorFlow's ``.h5`` files, without the HDF5 library.

A reader of the part of HDF5 that h5py writes by default and Keras uses: superblock 0 or 1, groups as B-trees of symbol
tables, floating-point datasets stored contiguously or within their header (HDF5 File Format Specification 3.0, sections
II.A, III.A-D, IV.A.1). So a broken file meets Python's bounds checks rather than C, and nothing needs installing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.bytes_reader import BytesReader
from optjax.checkpoints.errors import CheckpointError, reading
from optjax.checkpoints.tensors import MAX_DIMENSIONS, FileTensor, TensorRef

MAX_DEPTH = 32
MAX_NAME = 1000
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = (1 << 64) - 1
_DATASPACE, _LINK_INFO, _DATATYPE, _LINK, _LAYOUT, _FILTERS, _CONTINUED, _SYMBOL_TABLE = 1, 2, 3, 6, 8, 11, 16, 17
# By size in bytes and bits of exponent.
_FLOATS = {
    (2, 5): np.dtype("<f2"),
    (2, 8): np.dtype(jnp.bfloat16),
    (4, 8): np.dtype("<f4"),
    (8, 11): np.dtype("<f8"),
}


def read_hdf5(path: Path) -> dict[str, TensorRef]:
    """The datasets of one file by their path, such as ``model/decoder/layers.0/fc1/kernel:0``; none of them read yet.

    Raises:
      CheckpointError: it is no HDF5 file, or uses more of HDF5 than Keras does.
    """
    with reading(path), BytesReader(path) as file:
        if file.take(8) != _SIGNATURE:
            raise CheckpointError(f"{path} is not an HDF5 file")
        version = file.uint(1)
        file.skip(4)
        sizes = file.take(2)
        if version > 1 or sizes != b"\x08\x08":
            raise CheckpointError(f"{path} uses a newer HDF5 layout: write it again with h5py's default libver")
        file.seek((24 if version == 0 else 28) + 4 * 8)
        walker = _Walker(file)
        file.skip(8)
        walker.walk(_uint(file), "", 0)
    return walker.tensors


def _uint(file: BytesReader, n: int = 8) -> int:
    return file.uint(n, "little")


@dataclass
class _Walker:
    file: BytesReader
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def walk(self, address: int, name: str, depth: int) -> None:
        """A group or a dataset, by its object header."""
        self.visit(address)
        if depth > MAX_DEPTH:
            raise CheckpointError(f"more than {MAX_DEPTH} levels of groups")
        messages = self.messages(address)
        if _SYMBOL_TABLE in messages:
            self.file.seek(messages[_SYMBOL_TABLE])
            tree, heap = _uint(self.file), _uint(self.file)
            self.file.seek(heap)
            if self.file.take(4) != b"HEAP":
                raise CheckpointError(f"no heap of names at byte {heap}")
            self.file.skip(20)
            names = _uint(self.file)
            for offset, child in self.entries(tree, 0):
                self.walk(
                    child, f"{name}/{self.text(names + offset)}" if name else self.text(names + offset), depth + 1
                )
        elif _LAYOUT in messages:
            tensor = self.dataset(messages, name)
            if tensor is not None:
                self.tensors[name] = tensor
        elif _LINK in messages or _LINK_INFO in messages:
            raise CheckpointError(f"group {name!r} uses a newer HDF5 layout: write it again with h5py's default libver")

    def visit(self, address: int) -> None:
        if address in self.seen:
            raise CheckpointError(f"two things at byte {address}")
        self.seen.add(address)

    def text(self, start: int) -> str:
        self.file.seek(start)
        raw = self.file.take(min(MAX_NAME, self.file.size - start))
        end = raw.find(b"\0")
        if end < 0:
            raise CheckpointError(f"a name at byte {start} has no end")
        return raw[:end].decode("utf-8", errors="replace")

    def messages(self, address: int) -> dict[int, int]:
        """Where the data of an object header's messages start, by type; attributes and the like are passed over."""
        file = self.file
        file.seek(address)
        if file.uint(1) != 1:
            raise CheckpointError(f"no object header of version 1 at byte {address}")
        file.skip(1)
        count = _uint(file, 2)
        file.skip(4)
        length = _uint(file, 4)
        blocks = [(address + 16, length)]
        out: dict[int, int] = {}
        for start, length in blocks:
            at, end = start, start + length
            while at + 8 <= end and count > 0:
                file.seek(at)
                kind, size, flags = _uint(file, 2), _uint(file, 2), _uint(file, 1)
                at += 8
                count -= 1
                if kind == _CONTINUED:
                    file.seek(at)
                    blocks.append((_uint(file), _uint(file)))
                elif kind in (_DATASPACE, _DATATYPE, _LAYOUT, _FILTERS, _SYMBOL_TABLE, _LINK, _LINK_INFO):
                    if flags & 2:
                        raise CheckpointError(f"the object at byte {address} shares its type with another")
                    out[kind] = at
                at += size
        return out

    def entries(self, address: int, depth: int):
        """``(offset of the name, object header)`` of everything in a group's B-tree."""
        file = self.file
        self.visit(address)
        file.seek(address)
        signature = file.take(4)
        if signature == b"SNOD":
            file.skip(2)
            for i in range(_uint(file, 2)):
                file.seek(address + 8 + 40 * i)
                yield _uint(file), _uint(file)
        elif signature == b"TREE" and depth < MAX_DEPTH:
            file.skip(2)
            count = _uint(file, 2)
            for i in range(count):
                # Left and right sibling, then key, child, key, child, …
                file.seek(address + 8 + 16 + 16 * i + 8)
                yield from self.entries(_uint(file), depth + 1)
        else:
            raise CheckpointError(f"no group's B-tree at byte {address}")

    def dataset(self, messages: dict[int, int], name: str) -> FileTensor | None:
        """A dataset of floating-point numbers; None for one of anything else."""
        if _FILTERS in messages or not {_DATASPACE, _DATATYPE} <= messages.keys():
            raise CheckpointError(f"dataset {name!r} is compressed, or has no shape or type")
        file = self.file
        file.seek(messages[_DATATYPE])
        kind, order, _, _, size = file.uint(1) & 15, *file.take(3), _uint(file, 4)
        if kind != 1:
            return None
        file.skip(5)
        dtype = _FLOATS.get((size, file.uint(1)))
        if dtype is None:
            raise CheckpointError(f"dataset {name!r} has an unknown floating-point type of {size} bytes")
        dtype = dtype.newbyteorder(">") if order & 1 else dtype

        file.seek(messages[_DATASPACE])
        version, dimensions = file.uint(1), file.uint(1)
        if version not in (1, 2) or dimensions > MAX_DIMENSIONS:
            raise CheckpointError(f"dataset {name!r} has a shape that cannot be read")
        file.skip(6 if version == 1 else 2)
        shape = tuple(_uint(file) for _ in range(dimensions))

        file.seek(messages[_LAYOUT])
        version, layout = file.uint(1), file.uint(1)
        if version not in (3, 4) or layout not in (0, 1):
            raise CheckpointError(f"dataset {name!r} is stored in chunks: write it again without chunks or compression")
        if layout == 0:
            stored = _uint(file, 2)
            start = file.position
        else:
            start, stored = _uint(file), _uint(file)
        tensor = FileTensor(file.path, start, shape, dtype)
        if start == _UNDEFINED or tensor.nbytes != stored or start + stored > file.size:
            raise CheckpointError(f"dataset {name!r} of shape {shape} is not in the file: truncated?")
        return tensor
