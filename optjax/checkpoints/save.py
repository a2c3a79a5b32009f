"""Checkpoints out: the Hugging Face layout, written tensor by tensor and put in place only when complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.core import Tracer

from optjax.checkpoints.detect import WEIGHTS_NAMES
from optjax.checkpoints.entries import Entry, flax_entries, torch_entries
from optjax.checkpoints.flax_writer import write_flax
from optjax.checkpoints.lazy import LazyTensor
from optjax.checkpoints.quantized import config_entry
from optjax.checkpoints.safetensors_writer import write_safetensors
from optjax.lora.weight import check_not_adapted
from optjax.offloading import check_not_offloaded
from optjax.params import Params

_ARCHITECTURES = {
    "causal_lm": "OPTForCausalLM",
    None: "OPTModel",
    "sequence_classification": "OPTForSequenceClassification",
    "question_answering": "OPTForQuestionAnswering",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


_FORMATS: dict[str, tuple[Callable[[BinaryIO, Sequence[Entry]], None], Callable[[Params], Iterator[Entry]]]] = {
    "safetensors": (write_safetensors, torch_entries),
    "flax": (write_flax, flax_entries),
}
_HOLD_CODES = ("safetensors",)  # formats for quantized weights too


def save_params(
    params: Params,
    folder: str | Path,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes params as Hugging Face lays them out: weights, config.json, generation_config.json.

    transformers loads the folder as it is (``from_flax`` models for ``"flax"``). Stacked params are written like any
    others. Quantized params are written as they are, in codes and scales that only optjax reads. Tensors go to the
    files one at a time. Files appear under their names only once all of them are complete, so that a failure leaves the
    folder's earlier checkpoint as it was. Weights of the other format stay.

    Params that are spread over several processes are saved by all of them together; the first one writes the files,
    and nobody returns before they are there.

    Args:
      params: from `init_params`, `load_params` or training, any head.
      folder: made if need be.
      format: ``"safetensors"`` or ``"flax"`` (msgpack).
      max_shard_size: of one file, bytes or text such as ``"5GB"``; more weights go to several files and an index.

    Raises:
      ValueError: unknown format or one that cannot hold quantized weights, a size that makes no sense, params without
        values, or offloaded; or the folder has weights that `load_params` would read rather than those of this format,
        as it reads safetensors and ``.bin`` rather than ``"flax"``.
    """
    if isinstance(folder, str | os.PathLike) and format in _FORMATS and (others := read_before(Path(folder), format)):
        raise ValueError(
            f"{folder} has {others[0].name}, which would be loaded rather than weights in {format}'s format: give "
            "another folder, or remove it first"
        )
    save_over(params, folder, format, max_shard_size)


def save_over(params: Params, folder: str | Path, format: str, max_shard_size: int | str) -> None:
    """`save_params` in place of any model there: last of all, weights that would be read rather than these go."""
    if not isinstance(params, Params):
        raise ValueError(f"params should be what init_params or load_params return, not {type(params).__name__}")
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder should be a path, not {folder!r}")
    if format not in _FORMATS:
        raise ValueError(f"no format {format!r} to write; there are: {', '.join(_FORMATS)}")
    check_not_offloaded(params, "save_params does not read them")
    check_not_adapted(params, "save_adapters writes, and save_params does not")
    leaves = jax.tree.leaves(params)
    if any(isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray | LazyTensor) for x in leaves):
        raise ValueError("params hold something that is no array of values (abstract_params? inside jit?)")
    if params.quantization is not None and format not in _HOLD_CODES:
        raise ValueError(
            f"{format} files cannot hold weights quantized to {params.quantization.kind}; "
            f"write format={_HOLD_CODES[0]!r}, or optjax.dequantize them"
        )
    limit = parse_size(max_shard_size)
    write, make_entries = _FORMATS[format]
    shards = _split(list(make_entries(params)), limit)
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a checkpoint is written to a folder")
    together = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves)
    if together and jax.process_index() > 0:
        with open(os.devnull, "wb") as nowhere:
            for entries in shards:
                write(nowhere, entries)  # the first process needs this one's parts of each tensor
    else:
        _write_folder(params, folder, format, shards, write)
    if together:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"saved {folder.name}")


def _write_folder(params: Params, folder: Path, format: str, shards: list[list[Entry]], write: Callable) -> None:
    name = WEIGHTS_NAMES[format]
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
        _put_in_place(temporary, folder, files, format)
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


def _put_in_place(temporary: Path, folder: Path, files: list[str], format: str) -> None:
    """Complete files to their names, then the earlier weights away that would be read, too, or rather."""
    stale = [*read_before(folder, format), *_weights(folder, format)]
    for file in files:
        os.replace(temporary / file, folder / file)
    for path in stale:
        if path.name not in files:
            path.unlink()


def read_before(folder: Path, format: str) -> list[Path]:
    """Weights in a folder, of other formats, that `load_params` would read rather than those of this one."""
    folder, formats = folder.expanduser(), list(WEIGHTS_NAMES)
    earlier = formats[: formats.index(format)] if folder.is_dir() else []
    return [path for each in earlier for path in _weights(folder, each)]


def _weights(folder: Path, format: str) -> list[Path]:
    """The files of a format's weights; an index before what it names, so that no broken checkpoint is found."""
    stem, suffix = WEIGHTS_NAMES[format].rsplit(".", 1)
    name = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?")
    found = [path for path in folder.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.suffix != ".json")


def _config(params: Params) -> dict[str, Any]:
    config = params.config.to_dict()
    for stale in ("dtype", "quantization_config"):  # of the file that the config came from
        config.pop(stale, None)
    if params.quantization is not None:
        config["quantization_config"] = config_entry(params.quantization)
    return config | {"architectures": [_ARCHITECTURES[params.head]], "torch_dtype": str(params.dtype)}


def _generation(params: Params) -> dict[str, Any]:
    config = params.config.to_dict()
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
    return {"_from_model_config": True} | ids
