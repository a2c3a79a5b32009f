"""PEFT's files: adapter_config.json and adapter_model.safetensors, or .bin, in a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optjax.checkpoints.detect import ADAPTER_CONFIG
from optjax.checkpoints.entries import Entry
from optjax.checkpoints.errors import CheckpointError, listing, reading, shorten
from optjax.checkpoints.hub import resolve_source
from optjax.checkpoints.place import as_dtype
from optjax.checkpoints.safetensors_reader import read_safetensors
from optjax.checkpoints.safetensors_writer import write_safetensors
from optjax.checkpoints.tensors import TensorRef
from optjax.checkpoints.torch_reader import read_torch
from optjax.lora.config import TASK_TYPES, LoraConfig
from optjax.lora.layout import unstack_adapters
from optjax.lora.parts import LOW_RANK, Adapters, walk
from optjax.params import FLOATS, floating_dtype

WEIGHTS = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_torch}
_SAFETENSORS = next(iter(WEIGHTS))
_PREFIX = "base_model.model."
_OUTSIDE_DECODER = ("lm_head", "score", "qa_outputs")
_NAME = re.compile(
    r"(?P<outer>model\.)?(?:decoder\.(?:layers\.(?P<layer>\d{1,6})\.)?)?(?P<module>[a-z_0-9.]+?)"
    r"(?:\.(?P<low>lora_[AB])|\.base_layer|\.modules_to_save)?\.(?P<leaf>weight|bias)"
)


def load_adapters(
    source: str | Path,
    dtype: Any = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapters:
    """The adapters of a folder that PEFT or `save_adapters` wrote.

    `with_adapters` lays them out, and over devices, as the params are. Nothing in a file is ever executed.

    Args:
      source: a folder with adapter_config.json and adapter_model.safetensors (or .bin), or a hub id.
      dtype: a floating dtype for all of them; None keeps the file's.
      revision, token: of the hub: a branch, tag or commit; an access token.

    Raises:
      FileNotFoundError: nothing is at ``source``, or no adapter is in it.
      CheckpointError (a ValueError): a file is broken, or holds what optjax cannot apply: another method than LoRA,
        a config that asks for more, tensors of no module of OPT or of another rank than the config says.
    """
    dtype = None if dtype is None else floating_dtype(dtype)
    folder = resolve_source(source, revision=revision, token=token, adapter=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: looked for {ADAPTER_CONFIG} and {' or '.join(WEIGHTS)}")
    config = _read_config(folder / ADAPTER_CONFIG)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no weights of an adapter: looked for {' and '.join(WEIGHTS)}")
    tensors = WEIGHTS[path.name](path)
    with reading(path):
        return _adapters(path, config, tensors, dtype)


def _read_config(path: Path) -> LoraConfig:
    with reading(path):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise CheckpointError(f"{path} should hold a JSON object")
        try:
            return LoraConfig.from_dict(entries)
        except ValueError as error:
            raise CheckpointError(f"{path}: {shorten(str(error), 1000)}") from None


def _adapters(path: Path, config: LoraConfig, tensors: dict[str, TensorRef], dtype: Any) -> Adapters:
    tree: dict[str, Any] = {}
    unknown, odd, outer = [], [], False
    for name, tensor in sorted(tensors.items()):
        if name.endswith(".lm_head.base_layer.weight"):
            continue  # the base model's own, which PEFT writes beside an adapted head
        found = _NAME.fullmatch(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
        if found is None or ".base_layer.weight" in name or (found["low"] and found["leaf"] == "bias"):
            unknown.append(f"{shorten(name)} {tensor.shape}")
            continue
        if tensor.dtype not in FLOATS:
            odd.append(f"{name}: {tensor.dtype}")
            continue
        module, layer = found["module"], found["layer"]
        outer = outer or found["outer"] is not None or module in _OUTSIDE_DECODER
        steps: list[Any] = module.split(".") if layer is None else ["layers", int(layer), *module.split(".")]
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[found["low"] or found["leaf"]] = tensor
        whole = name.removeprefix(_PREFIX).rpartition(f".{found['low']}.")[0]
        if found["low"] and tensor.shape[0 if found["low"] == "lora_A" else -1] != (r := config.rank(whole)):
            odd.append(f"{name} {tensor.shape}: the config says rank {r}")
    for where, own in _modules(tree, ()):
        if len(own.keys() & set(LOW_RANK)) == 1:
            odd.append(f"{'.'.join(map(str, where))} has only one of {' and '.join(LOW_RANK)}")
    problems = {"that are of no module that optjax adapts": unknown, "that do not fit": odd}
    if unknown or odd or not tensors:
        lines = [f"{path} holds no adapter for OPT's modules"]
        lines += [listing(f"tensors {kind}", items) for kind, items in problems.items() if items]
        raise CheckpointError("\n".join(lines))

    def read(tensor: TensorRef) -> jax.Array:
        kept = jax.dtypes.canonicalize_dtype(tensor.dtype) if dtype is None else dtype
        return jnp.asarray(as_dtype(tensor.read(), np.dtype(kept)))

    layers = tree.pop("layers", None)
    made = jax.tree.map(read, tree)
    if layers is not None:
        made["layers"] = [jax.tree.map(read, layers.get(i, {})) for i in range(max(layers) + 1)]
    head = TASK_TYPES[config.task_type] if config.task_type else "causal_lm" if outer else None
    return Adapters(made, config, head)


def _modules(node: dict[Any, Any], steps: tuple[Any, ...]):
    if not any(isinstance(value, dict) for value in node.values()):
        yield steps, node
        return
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _modules(value, (*steps, name))


def save_adapters(adapters: Adapters, folder: str | Path) -> None:
    """Writes adapters as PEFT lays them out: ``PeftModel.from_pretrained(model, folder)`` loads them.

    Both files appear under their names only once they are complete. Adapters that are spread over several processes
    are saved by all of them together; the first one writes.

    Args:
      adapters: stacked or not.
      folder: made if need be.

    Raises:
      ValueError: no adapters, or abstract ones; ``folder`` is a file.
    """
    if not isinstance(adapters, Adapters):
        raise ValueError(
            f"adapters should be what init_adapters or load_adapters return, not {type(adapters).__name__}"
        )
    leaves = jax.tree.leaves(adapters)
    if not all(isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer) for x in leaves):
        raise ValueError("adapters hold something that is no array of values (inside jit?)")
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; adapters are written to a folder")
    entries = _entries(unstack_adapters(adapters))
    together = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves)
    if together and jax.process_index() > 0:
        with open(os.devnull, "wb") as nowhere:
            write_safetensors(nowhere, entries)  # the first process needs this one's parts of each
    else:
        _write(folder, entries, adapters.config)
    if together:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"saved {folder.name}")


def _entries(adapters: Adapters) -> list[Entry]:
    prefix = _PREFIX if adapters.head is None else f"{_PREFIX}model."
    entries = []
    for path, layer, own in walk(adapters):
        module = ".".join(path)
        if path[0] in _OUTSIDE_DECODER:
            module = _PREFIX + module
        else:
            module = f"{prefix}decoder." + (module if layer is None else module.replace("layers", f"layers.{layer}", 1))
        inside = "base_layer." if "lora_A" in own else ""
        for leaf, array in own.items():
            name = f"{module}.{leaf}.weight" if leaf in LOW_RANK else f"{module}.{inside}{leaf}"
            entries.append(Entry(name, tuple(array.shape), np.dtype(array.dtype), array, None))
    return sorted(entries, key=lambda entry: entry.name)


def _write(folder: Path, entries: list[Entry], config: LoraConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        with open(temporary / _SAFETENSORS, "wb") as out:
            write_safetensors(out, entries)
            out.flush()
            os.fsync(out.fileno())
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
        (temporary / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        for name in (_SAFETENSORS, ADAPTER_CONFIG):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
