"""Writes Flax's msgpack, one tensor in memory at a time. The layout is described in `flax_reader`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from optjax.checkpoints.entries import Entry
from optjax.checkpoints.flax_reader import CHUNKED

MAX_CHUNK = 2**30  # Bytes of one array, as flax.serialization has it.


def write_flax(out: BinaryIO, entries: Sequence[Entry]) -> None:
    """Entries named ``a/b/c`` as nested maps."""
    import msgpack

    tree: dict[str, Any] = {}
    for entry in entries:
        *steps, last = entry.name.split("/")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = entry
    _write(out, tree, msgpack.Packer())


def _write(out: BinaryIO, node: dict[str, Any], packer: Any) -> None:
    out.write(packer.pack_map_header(len(node)))
    for key, value in node.items():
        out.write(packer.pack(key))
        if isinstance(value, dict):
            _write(out, value, packer)
        elif value.nbytes > MAX_CHUNK:
            _write_chunks(out, value, packer)
        else:
            _write_array(out, value.shape, value.dtype.name, value.raw(), packer)


def _write_chunks(out: BinaryIO, entry: Entry, packer: Any) -> None:
    size = MAX_CHUNK // entry.dtype.itemsize * entry.dtype.itemsize
    data = entry.raw()
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    shape = {str(i): n for i, n in enumerate(entry.shape)}
    for part in (packer.pack_map_header(3), packer.pack(CHUNKED), packer.pack(True)):
        out.write(part)
    for part in (packer.pack("shape"), packer.pack(shape), packer.pack("chunks"), packer.pack_map_header(len(chunks))):
        out.write(part)
    for i, chunk in enumerate(chunks):
        out.write(packer.pack(str(i)))
        _write_array(out, (len(chunk) // entry.dtype.itemsize,), entry.dtype.name, chunk, packer)


def _write_array(out: BinaryIO, shape: tuple[int, ...], dtype: str, data: memoryview, packer: Any) -> None:
    head = packer.pack_array_header(3) + packer.pack(list(shape)) + packer.pack(dtype)
    head += b"\xc6" + len(data).to_bytes(4, "big")  # A byte string of 32-bit length.
    out.write(b"\xc9" + (len(head) + len(data)).to_bytes(4, "big") + b"\x01" + head)  # An extension of type 1.
    out.write(data)
