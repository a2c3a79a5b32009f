"""Which checkpoint format a folder or a file holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from optjax.checkpoints.errors import CheckpointError, reading, shorten

# Best first: safetensors is the safest and reads fastest.
WEIGHTS_NAMES = {
    "safetensors": "model.safetensors",
    "torch": "pytorch_model.bin",
    "flax": "flax_model.msgpack",
    "tf": "tf_model.h5",
}
SUFFIXES = {".safetensors": "safetensors", ".bin": "torch", ".msgpack": "flax", ".h5": "tf", ".pt": "metaseq"}
# Of PEFT, beside the weights of an adapter.
ADAPTER_CONFIG = "adapter_config.json"
NPY_NAME = "decoder.embed_tokens.weight"
_PT_NUMBERS = re.compile(r"(?<=-model_part-)\d+|(?<=-shard)-?\d+(?=\.pt$)")


@dataclass(frozen=True)
class Found:
    """A checkpoint: its format, the folder it lies in, and its files."""

    format: str
    folder: Path
    files: tuple[Path, ...]


def find_checkpoint(path: Path) -> Found:
    """The checkpoint at a path: a folder (safetensors first, then .bin, .msgpack, .h5, .pt, .npy), a file, or an index.

    Raises:
      FileNotFoundError: nothing is there, or no format is recognized; the message says what was looked for.
      CheckpointError: an index is broken or names files outside its folder.
    """
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder at {path}")
    if path.name.endswith(".index.json"):
        stem = path.name.removesuffix(".index.json")
        return _from_index(_format_of(Path(stem)), path)
    kind = _format_of(path)
    if kind == "metaseq":
        return Found(kind, path.parent, _siblings(path))
    return Found(kind, path.parent, (path,))


def _format_of(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} has none of the endings of a checkpoint: {', '.join(SUFFIXES)}")
    return SUFFIXES[path.suffix]


def _find_in_folder(folder: Path) -> Found:
    for kind, name in WEIGHTS_NAMES.items():
        if (folder / name).is_file():
            return Found(kind, folder, (folder / name,))
        if (folder / f"{name}.index.json").is_file():
            return _from_index(kind, folder / f"{name}.index.json")
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter, and no model: load the model that it was trained on{_base(folder)}, then "
            "optjax.with_adapters(params, optjax.load_adapters(folder)); on the command line --adapter"
        )
    for suffix, kind in SUFFIXES.items():
        files = sorted(p for p in folder.glob(f"*{suffix}") if p.is_file() and p.name != "training_args.bin")
        if kind == "metaseq" and files:
            groups = {_siblings(p) for p in files}
            if len(groups) > 1:
                names = ", ".join(sorted(group[0].name for group in groups)[:10])
                raise CheckpointError(f"{folder} holds several metaseq checkpoints; name one of them: {names}")
            return Found(kind, folder, groups.pop())
        if len(files) == 1:
            return Found(kind, folder, tuple(files))
    if any((folder / name).is_file() for name in (NPY_NAME, f"{NPY_NAME}.npy")):
        return Found("npy", folder, tuple(sorted(p for p in folder.iterdir() if p.is_file())))
    looked = ", ".join(f"{name}, {name}.index.json" for name in WEIGHTS_NAMES.values())
    raise FileNotFoundError(
        f"{folder} holds no checkpoint: looked for {looked}, *.pt (metaseq), {NPY_NAME}[.npy] (Alpa)"
    )


def _base(folder: Path) -> str:
    """Of an adapter, in words, as far as its config says."""
    with reading(folder / ADAPTER_CONFIG):
        entries = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name = entries.get("base_model_name_or_path") if isinstance(entries, dict) else None
    return f" ({shorten(str(name))})" if name else ""


def _siblings(path: Path) -> tuple[Path, ...]:
    """The parts and shards of the metaseq checkpoint that ``path`` belongs to: the same name but for their numbers."""
    pattern = _PT_NUMBERS.sub("", path.name)
    return tuple(sorted(p for p in path.parent.glob("*.pt") if _PT_NUMBERS.sub("", p.name) == pattern))


def _from_index(kind: str, path: Path) -> Found:
    with reading(path):
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
            raise CheckpointError(f"{path} should have a weight_map from tensor names to file names")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path} names {shorten(name)!r}, which is not a file beside it: refused")
        if Path(name).suffix not in SUFFIXES or _format_of(Path(name)) != kind:
            raise CheckpointError(f"{path} names {shorten(name)!r}, which is no {kind} file")
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        shown = ", ".join(shorten(name) for name in missing[:10])
        raise FileNotFoundError(f"{path} names {len(missing)} files that are not there: {shown}")
    return Found(kind, path.parent, tuple(path.parent / name for name in files))
