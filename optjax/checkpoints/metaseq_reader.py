"""metaseq's ``.pt`` files, the form OPT was trained and first published in.

One file holds everything, or the model is cut twice: model-parallel parts (``-model_part-N``) hold slices of the
matrices, and each part's FSDP shards (``-shardN``) hold stretches of its weights laid end to end.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from optjax.checkpoints.errors import CheckpointError, listing, reading, shorten
from optjax.checkpoints.tensors import Joined, Reshaped, Rows, TensorRef
from optjax.checkpoints.torch_reader import ToRef, open_torch
from optjax.checkpoints.unpickle import PickledTensor

MAX_FILES = 10_000  # The 175B model has 992.
# How a tensor is cut into model-parallel parts (Megatron); what is in neither group is the same in all parts.
_CUT_ROWS = re.compile(r"embed_tokens\.weight$|output_projection\.weight$|\.(q|k|v|qkv)_proj\.|\.fc1\.")
_CUT_COLUMNS = re.compile(r"\.(fc2|out_proj)\.weight$")
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_fpw_module\.")


def read_metaseq(files: tuple[Path, ...]) -> tuple[dict[str, TensorRef], Any]:
    """The whole model's tensors by metaseq's names, with q, k and v apart; and its training arguments.

    The arguments are inert data, and None where the files are a plain state dict.

    Raises:
      CheckpointError: a file is broken, or parts or shards are missing or do not belong together.
    """
    parts: list[dict[str, TensorRef]] = []
    arguments: Any = None
    for shards in _grid(files):
        opened = []
        for path in shards:
            content, to_ref = open_torch(path)
            if not isinstance(content, dict):
                raise CheckpointError(f"{path} should hold a dictionary")
            arguments = arguments if arguments is not None else (content.get("cfg") or content.get("args"))
            opened.append((content, to_ref))
        with reading(shards[0]):
            parts.append(_join_shards(opened, shards))
    with reading(files[0]):
        return _split_qkv(_join_parts(parts)), arguments


def _grid(files: tuple[Path, ...]) -> list[list[Path]]:
    """The files of each model-parallel part, in the order of their shards."""
    numbered: dict[int, dict[int, Path]] = {}
    for path in files:
        part, shard = (re.search(p, path.stem) for p in (r"-model_part-(\d+)", r"-shard-?(\d+)$"))
        numbered.setdefault(int(part[1]) if part else 0, {})[int(shard[1]) if shard else 0] = path
    parts, shards = max(numbered) + 1, max(max(each) for each in numbered.values()) + 1
    missing = [f"model part {i} of {parts}" for i in range(min(parts, MAX_FILES)) if i not in numbered]
    for part, each in sorted(numbered.items()):
        missing += [
            f"shard {i} of {shards} of model part {part}" for i in range(min(shards, MAX_FILES)) if i not in each
        ]
    if missing:
        raise CheckpointError(f"{files[0].parent} lacks files\n{listing('missing', missing)}")
    return [[path for _, path in sorted(each.items())] for _, each in sorted(numbered.items())]


def _join_shards(opened: list[tuple[dict, ToRef]], files: list[Path]) -> dict[str, TensorRef]:
    """One model-parallel part, from its shards."""
    models = []
    for content, to_ref in opened:
        model = content.get("model", content)
        if not isinstance(model, dict):
            raise CheckpointError("'model' should be a dictionary of tensors")
        tensors = {k: v for k, v in model.items() if isinstance(k, str) and isinstance(v, PickledTensor)}
        models.append({_WRAPPERS.sub("", k): to_ref(v) for k, v in tensors.items()})
    if not any("flat_param" in name for name in models[0]):
        if len(models) > 1:
            raise CheckpointError(f"{len(files)} shards, but what they hold is not sharded: name one file")
        return models[0]
    metadata: list[Any] = [content.get("shard_metadata") for content, _ in opened]
    if not all(isinstance(m, dict) and isinstance(m.get("param_metadata"), list) for m in metadata):
        raise CheckpointError("the weights are flat, but shard_metadata, which says how to unfold them, is missing")
    out = {name: tensor for name, tensor in models[0].items() if "flat_param" not in name}
    for i, one in enumerate(metadata[0]["param_metadata"]):
        for flat_name, layout in one["params"].items():
            name = _under(one["fsdp_path"], flat_name)
            pieces = []
            for model, its in zip(models, metadata, strict=True):
                padding = its["param_metadata"][i]["params"][flat_name]["padding"]
                whole = model[name]
                if len(whole.shape) != 1 or not 0 <= padding <= whole.shape[0]:
                    raise CheckpointError(f"{shorten(name)} should be flat, and longer than its padding")
                pieces.append(Rows(whole, 0, whole.shape[0] - padding))
            _unfold(out, one["fsdp_path"], layout, Joined(tuple(pieces)))
    return out


def _under(path: Any, name: str) -> str:
    return _WRAPPERS.sub("", f"{path}.{name}" if path else name)


def _unfold(out: dict[str, TensorRef], path: Any, layout: dict[str, Any], flat: TensorRef) -> None:
    """The weights that lie end to end in ``flat``."""
    at = 0
    for name, shape, numel in zip(layout["names"], layout["shapes"], layout["numels"], strict=True):
        shape = tuple(shape)
        if not all(type(n) is int and n >= 0 for n in (*shape, numel)) or math.prod(shape) != numel:
            raise CheckpointError(f"{shorten(str(name))} of shape {shape} cannot have {numel} elements")
        out[_under(path, name)] = Reshaped(flat, at, shape)
        at += numel
    if at != flat.shape[0]:
        raise CheckpointError(
            f"flat weights under {shorten(str(path))!r} hold {flat.shape[0]} elements, not {at}: a shard is missing?"
        )


def _join_parts(parts: list[dict[str, TensorRef]]) -> dict[str, TensorRef]:
    """The whole model, from its model-parallel parts. A fused qkv stays K, V, Q, each of them whole."""
    if len(parts) == 1:
        return parts[0]
    out: dict[str, TensorRef] = {}
    for name in parts[0]:
        lacking = [i for i, part in enumerate(parts) if name not in part]
        if lacking:
            raise CheckpointError(f"{shorten(name)} is in model part 0, but not in parts {lacking[:20]}")
        pieces = tuple(part[name] for part in parts)
        if len({(piece.shape, piece.dtype) for piece in pieces}) > 1:
            raise CheckpointError(f"{shorten(name)} has different shapes or dtypes in the model parts")
        if ".qkv_proj." in name:
            thirds = [_third(piece, i) for i in range(3) for piece in pieces]
            out[name] = Joined(tuple(thirds))
        elif _CUT_ROWS.search(name):
            out[name] = Joined(pieces)
        elif _CUT_COLUMNS.search(name) and len(pieces[0].shape) == 2:
            out[name] = Joined(pieces, axis=1)
        else:
            out[name] = pieces[0]
    return out


def _third(fused: TensorRef, i: int) -> TensorRef:
    rows = fused.shape[0] // 3
    if rows * 3 != fused.shape[0]:
        raise CheckpointError(f"a fused qkv_proj of shape {fused.shape} does not divide by 3")
    return Rows(fused, i * rows, (i + 1) * rows)


def _split_qkv(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    out: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." in name:
            for i, letter in enumerate("kvq"):  # metaseq's order.
                out[name.replace(".qkv_proj.", f".{letter}_proj.")] = _third(tensor, i)
        else:
            out[name] = tensor
    return out
