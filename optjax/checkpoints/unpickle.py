"""Reads a pickle as data: an interpreter of its opcodes that can build containers and nothing else.

No class is looked up, nothing is imported and nothing is called, so there is nothing a hostile pickle could run. What
the pickle names becomes a `Global`, what it would call or instantiate becomes an `Inert` record of the request, and the
few calls that describe tensors become `PickledTensor`. Python's own unpickler is not used even with a restricted
``find_class``: a few bytes make it reserve gigabytes.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

from optjax.checkpoints.errors import CheckpointError, shorten

MAX_BYTES = 64_000_000
MAX_OPCODES = 5_000_000
# Names that real checkpoints hold: in state dicts, and in the training arguments that metaseq keeps beside them. Any
# other is a sign that the file wants something run, and is refused by name.
KNOWN_MODULES = {
    "_codecs", "apex", "argparse", "collections", "copyreg", "copy_reg", "datetime", "enum", "fairscale", "fairseq",
    "hydra", "megatron", "metaseq", "metaseq_internal", "numpy", "omegaconf", "pathlib", "torch", "typing",
}  # fmt: skip
KNOWN_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "slice",
    "str", "tuple",
}  # fmt: skip


@dataclass(frozen=True)
class Global:
    """A name such as ``torch.FloatStorage``, which stays a name."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object the pickle asked for: the name of what would have made it, and the state it would have."""

    name: str
    args: Any = ()
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """The bytes of one or more tensors: the type's name (``FloatStorage``), its key in the file, its length."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A view into a storage; offset, shape and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def unpickle(data: bytes, start: int = 0) -> tuple[Any, int]:
    """The object pickled at ``start``, and where its pickle ends.

    Raises:
      CheckpointError: the pickle names something no checkpoint needs, or is not a pickle.
    """
    machine = _Machine()
    try:
        for count, (opcode, arg, position) in enumerate(pickletools.genops(data[start : start + MAX_BYTES])):
            if count >= MAX_OPCODES:
                raise CheckpointError(f"the pickle has more than {MAX_OPCODES} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop(), start + (position or 0) + 1
            machine.step(opcode.name, arg)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"not a readable pickle: {type(error).__name__}: {shorten(str(error))}") from error
    raise CheckpointError("the pickle has no end")


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if name in _VALUES:
            push(arg)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            push(_MARK)
        elif name == "POP":
            pop()
        elif name == "POP_MARK":
            self.to_mark()
        elif name == "DUP":
            push(self.stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[arg])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            self.stack[-n:] = [tuple(self.stack[-n:])]
        elif name == "TUPLE":
            push(tuple(self.to_mark()))
        elif name in ("LIST", "FROZENSET"):
            push(self.to_mark())
        elif name == "DICT":
            items = self.to_mark()
            push({})
            self.set_items(items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [pop()] if name == "APPEND" else self.to_mark()
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = pop(), pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.to_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            attribute, module = (pop(), pop()) if arg is None else reversed(arg.split(" ", 1))
            push(_known(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = pop(), pop()
            push(_request(function, args))
        elif name == "NEWOBJ_EX":
            _, args, function = pop(), pop(), pop()
            push(_request(function, args))
        elif name == "BUILD":
            state = pop()
            if isinstance(self.stack[-1], Inert):
                self.stack[-1].state = state if isinstance(state, dict) else {"state": state}
        elif name == "BINPERSID":
            push(_storage(pop()))
        else:
            # INST and OBJ (protocol 0), EXT, PERSID, out-of-band buffers: no tool has written checkpoints with them.
            raise CheckpointError(f"the pickle uses {name}, which no checkpoint needs")

    def to_mark(self) -> list[Any]:
        """Everything above the last mark, which goes away too."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise CheckpointError("the pickle closes a group it did not open")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target = target.state
        if isinstance(target, dict):
            for key, value in zip(flat[::2], flat[1::2], strict=True):
                # Only plain keys: hashing nested tuples of shared tuples can take forever.
                if isinstance(key, str | int | float | bytes | None):
                    target[key] = value


def _known(module: Any, attribute: Any) -> Global:
    name = f"{module}.{attribute}"
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise CheckpointError("the pickle names a global by something that is no text")
    top = module.split(".")[0]
    if top in KNOWN_MODULES or (top in ("builtins", "__builtin__") and attribute in KNOWN_BUILTINS):
        return Global(name)
    raise CheckpointError(
        f"the pickle refers to {shorten(name)!r}, which no checkpoint needs: refused, nothing was run"
    )


def _request(function: Any, args: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise CheckpointError("the pickle calls something that is no name")
    match function.name:
        case "collections.OrderedDict" | "builtins.dict" | "collections.defaultdict":
            pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
            pairs = [p for p in pairs if isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str)]
            return {key: value for key, value in pairs}
        case "torch.Size" if len(args) == 1 and isinstance(args[0], list | tuple):
            return tuple(args[0])
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" if len(args) >= 4:
            return _tensor(*args[:4])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" if args:
            return args[0]
    return Inert(function.name, args)


def _storage(description: Any) -> Storage:
    match description:
        case ("storage", Global(name=name), str(key), _, int(numel), *_) if name.startswith("torch."):
            return Storage(name.rsplit(".", 1)[-1], key, numel)
    raise CheckpointError("the pickle refers to outside data that is no tensor storage")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise CheckpointError("the pickle describes a tensor without storage, shape or strides")
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *strides)):
        raise CheckpointError("the pickle describes a tensor of impossible shape, strides or offset")
    return PickledTensor(storage, offset, shape, strides)
