"""Pickles that want something run, or far too much memory or time, written opcode by opcode."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def payloads(sentinel: Path) -> Iterator[tuple[str, bytes]]:
    """Bodies of pickles, without protocol header and stop, that make the file ``sentinel`` if they are run."""
    touch, python = f"touch {sentinel}", f"__import__('pathlib').Path({str(sentinel)!r}).touch()"
    yield "os.system", call("os", "system", text(touch))
    yield "posix.system", call("posix", "system", text(touch))
    yield "nt.system", call("nt", "system", text(touch))
    yield "subprocess", call("subprocess", "getoutput", text(touch))
    yield "eval", call("builtins", "eval", text(python))
    yield "python 2 eval", call("__builtin__", "eval", text(python))
    yield "exec", call("builtins", "exec", text(python))
    yield "getattr", call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))
    yield "runpy", call("runpy", "_run_code", text(python), b"}")
    yield "pip", call("pip", "main", b"]" + text("--version") + b"a")
    yield "webbrowser", call("webbrowser", "open", text("http://127.0.0.1:1/"))
    yield "torch.load", call("torch", "load", text("/etc/passwd"))
    yield "torch.hub", call("torch.hub", "load_state_dict_from_url", text("http://127.0.0.1:1/"))
    yield "numpy memmap", call("numpy", "memmap", text(str(sentinel)), text("f4"), text("w+"), b"K\x00", b"K\x01\x85")
    yield "numpy f2py", call("numpy.f2py.diagnose", "run_command", text(touch))
    yield "torch.os.system", b"\x8c\x05torch\x8c\x09os.system\x93(" + text(touch) + b"tR"
    yield "stack global", b"\x8c\x02os\x8c\x06system\x93(" + text(touch) + b"tR"
    yield "new object", b"csubprocess\nPopen\n" + text(touch) + b"\x85\x81"
    yield "new object with keywords", b"csubprocess\nPopen\n)}" + text("args") + text(touch) + b"s\x92"
    yield "instance", b"(" + text(touch) + b"ios\nsystem\n"
    yield "object", b"(cos\nsystem\n" + text(touch) + b"o"
    yield "state", call("collections", "OrderedDict") + b"}" + text("__class__") + b"cos\nsystem\nsb"
    yield "setstate", call("argparse", "Namespace") + b"}" + text("__setstate__") + b"cos\nsystem\nsb"
    yield "extension", b"\x82\x01"
    yield "persistent text", b"Pos.system\n"
    yield "persistent", text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x08tQ"
    yield "call of a text", text("os.system") + b"(" + text(touch) + b"tR"
    yield "call of a storage", b"ctorch\nFloatStorage\n" + text(touch) + b"R"
    # Too deep, too large, too many.
    yield "deep lists", b"]" * 100_000 + b"a" * 99_999
    yield "deep tuples", b")" + b"\x85" * 100_000
    yield "deep dictionaries", b"}K\x01" * 50_000 + b"N" + b"s" * 50_000
    yield "itself", b"]q\x00h\x00a"
    yield "memo of 4 G", b"Nr\xff\xff\xff\xff"
    yield "memo as text", b"Np99999999999999999999\n"
    yield "text of 2^62", b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc"
    yield "bytes of 4 GB", b"B" + struct.pack("<I", 0xFFFFFFFF) + b"abc"
    yield "bytes of 2^63", b"\x8e" + struct.pack("<Q", (1 << 63) - 1)
    yield "bytearray of 2^63", b"\x96" + struct.pack("<Q", (1 << 63) - 1)
    yield "frame of 2^62", b"\x95" + struct.pack("<Q", 1 << 62) + b"N"
    yield "number of -1 bytes", b"\x8b" + struct.pack("<i", -1)
    yield "number of 2 GB", b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\xff" * 9
    yield "number as text", b"I" + b"9" * 100_000 + b"\n"
    yield "keys that take forever", b"N" + b"2\x86" * 60 + b"}" + b"\x94" + b"0" + b"}" + b"N" + b"2\x86" * 60 + b"Ns"
    yield "many instructions", b"N0" * 100_000
    yield "empty stack", b"0" * 10
    yield "unopened group", b"N" * 5 + b"t"
    yield "float", b"G" + b"\x00" * 3
    yield "bad utf-8", b"X\x02\x00\x00\x00\xff\xfe"
    for shape, strides, offset in [
        ((1 << 40, 1 << 40), (1, 1), 0),
        ((1 << 61,), (0,), 0),
        ((24, 24), (0, 0), 0),
        ((4,), (1 << 60,), 0),
        ((4,), (1,), 1 << 61),
        ((4,) * 60, (1,) * 60, 0),
        ((-4,), (1,), 0),
        ((4,), (-1,), 0),
    ]:
        yield f"tensor of {shape}", tensor(shape, strides, offset)
    yield "tensor of text", tensor("abc", (1,), 0)
    yield (
        "tensor without storage",
        call("torch._utils", "_rebuild_tensor_v2", b"N", b"K\x00", b"K\x01\x85", b"K\x01\x85"),
    )


def number(n: int) -> bytes:
    data = n.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(shape, strides, offset: int) -> bytes:
    def pack(numbers) -> bytes:
        return text(numbers) if isinstance(numbers, str) else b"(" + b"".join(map(number, numbers)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(8) + b"tQ"
    return call(
        "torch._utils", "_rebuild_tensor_v2", storage, number(offset), pack(shape), pack(strides), b"\x89", b"N"
    )


def in_dictionary(body: bytes, key: str = "decoder.embed_tokens.weight") -> bytes:
    """A whole pickle of a state dict whose only value is what ``body`` makes."""
    return b"\x80\x04}" + text(key) + body + b"s."


def as_zip(pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with this pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages if storages is not None else {"0": bytes(32)}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def as_legacy(pickled: bytes) -> bytes:
    """A file of torch.save from before it wrote zips."""
    head = b"\x80\x02" + b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."
    return head + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + pickled + b"\x80\x02]." + bytes(64)
