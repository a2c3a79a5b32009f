"""Checkpoints out: the Hugging Face layout, written tensor by tensor and put in place only when complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optjax.checkpoints.detect import WEIGHTS_NAMES
from optjax.checkpoints.match import expected
from optjax.params import Params

_ARCHITECTURES = {
    "causal_lm": "OPTForCausalLM",
    None: "OPTModel",
    "sequence_classification": "OPTForSequenceClassification",
    "question_answering": "OPTForQuestionAnswering",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name in the file, and where to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    array: Any
    layer: int | None
    transpose: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        value = to_host(self.array if self.layer is None else _take(self.array, np.int32(self.layer)))
        return np.ascontiguousarray(value.T if self.transpose else value)


def to_host(array: Any) -> np.ndarray:
    """The values of an array. A jax array keeps the host's copy it is asked for, so a passing twin is asked instead."""
    if isinstance(array, jax.Array):
        parts = [shard.data for shard in array.addressable_shards]
        array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
    return np.asarray(array)


@jax.jit
def _take(stacked: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)


def save_params(
    params: Params,
    folder: str | Path,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes params as Hugging Face lays them out: weights, config.json, generation_config.json.

    transformers loads the folder as it is (``from_flax`` models for ``"flax"``). Stacked params are written like any
    others. Tensors go to the files one at a time. Files appear under their names only once all of them are complete, so
    that a failure leaves the folder's earlier checkpoint as it was. Weights of the other format in the folder stay.

    Args:
      params: from `init_params`, `load_params` or training, any head.
      folder: made if need be.
      format: ``"safetensors"`` or ``"flax"`` (msgpack).
      max_shard_size: of one file, bytes or text such as ``"5GB"``; more weights go to several files and an index.

    Raises:
      ValueError: unknown format, a size that makes no sense, params without values.
    """
    if not isinstance(params, Params):
        raise ValueError(f"params should be what init_params or load_params return, not {type(params).__name__}")
    if format not in _FORMATS:
        raise ValueError(f"no format {format!r} to write; there are: {', '.join(_FORMATS)}")
    leaves = jax.tree.leaves(params)
    if any(isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in leaves):
        raise ValueError("params hold something that is no array of values (abstract_params? inside jit?)")
    limit = parse_size(max_shard_size)
    write, make_entries = _FORMATS[format]
    shards = _split(list(make_entries(params)), limit)
    name = WEIGHTS_NAMES[format]
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a checkpoint is written to a folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        files = [name] if len(shards) == 1 else [_shard_name(name, i, len(shards)) for i in range(len(shards))]
        for file, entries in zip(files, shards, strict=True):
            with open(temporary / file, "wb") as out:
                write(out, entries)
                out.flush()
                os.fsync(out.fileno())
        if len(shards) > 1:
            total = sum(e.nbytes for entries in shards for e in entries)
            places = {e.name: file for file, entries in zip(files, shards, strict=True) for e in entries}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            files.append(f"{name}.index.json")
            (temporary / files[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file, content in (("config.json", _config(params)), ("generation_config.json", _generation(params))):
            (temporary / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            files.append(file)
        _put_in_place(temporary, folder, files, name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text such as ``"5GB"`` or ``"512MiB"``."""
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]i?B|)\s*", str(size), re.IGNORECASE)
    if not match or isinstance(size, bool) or int(match[1]) == 0:
        raise ValueError(f"max_shard_size should be a positive number of bytes or text such as '5GB', not {size!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _split(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Consecutive entries of at most ``limit`` bytes together; a larger one stands alone."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _shard_name(name: str, i: int, n: int) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}-{i + 1:05d}-of-{n:05d}.{suffix}"


def _put_in_place(temporary: Path, folder: Path, files: list[str], name: str) -> None:
    """Complete files to their names, and the earlier checkpoint of this format away."""
    stem, suffix = name.rsplit(".", 1)
    old = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?")
    stale = [p for p in folder.iterdir() if old.fullmatch(p.name) and p.name not in files]
    for file in files:
        os.replace(temporary / file, folder / file)
    for path in stale:
        path.unlink()


def _config(params: Params) -> dict[str, Any]:
    config = params.config.to_dict()
    config.pop("dtype", None)
    return config | {"architectures": [_ARCHITECTURES[params.head]], "torch_dtype": str(params.dtype)}


def _generation(params: Params) -> dict[str, Any]:
    config = params.config.to_dict()
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
    return {"_from_model_config": True} | ids


def _torch_entries(params: Params) -> Iterator[Entry]:
    for weight, layer, _ in expected(params.config, params.head):
        name = weight.hf_name(layer)
        if params.head is None:
            name = name.removeprefix("model.")  # As transformers' base model has it.
        array, picked = _find(params, weight.keys(layer), layer)
        yield Entry(name, weight.shape, np.dtype(array.dtype), array, picked)


def _find(params: Params, keys: tuple[str | int, ...], layer: int | None) -> tuple[Any, int | None]:
    """The leaf a weight is in, and the layer to take of it where it is stacked."""
    node: Any = params.weights
    stacked = params.stacked and layer is not None
    for key in keys:
        node = node if stacked and isinstance(key, int) else node[key]
    return node, layer if stacked else None


_SAFETENSORS_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _write_safetensors(out: Any, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        if entry.dtype.name not in _SAFETENSORS_TYPES:
            raise ValueError(f"{entry.name} is {entry.dtype.name}; weights are saved as floating point")
        kind = _SAFETENSORS_TYPES[entry.dtype.name]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors start at a multiple of 8, as the reference implementation aligns them.
    out.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        out.write(entry.read().reshape(-1).view(np.uint8).data)


_FORMATS = {"safetensors": (_write_safetensors, _torch_entries)}
