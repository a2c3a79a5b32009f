"""``optjax info``: the parameters and the memory of published sizes and of checkpoints."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optjax.cli import sizes
from optjax.cli.arguments import add_revision
from optjax.config import OPTConfig

SUMMARY = "parameters and memory of a size or a checkpoint"
OPERANDS = "[SOURCE …]"
TEXT = """\
What a model is made of and what it needs: parameters by part, memory of the
weights, of the KV cache and of training. For a size by its name, or for a
checkpoint, of which only the headers are read.
"""
EXAMPLES = """\
examples:
  optjax info                                          all published sizes
  optjax info opt-175b
  optjax info opt-mini ./my-checkpoint facebook/opt-125m
  optjax info opt-30b --json | jq .[0].memory
"""


@dataclass
class Model:
    """What is known of one source. ``checkpoint`` describes its files, and is None where there are none here."""

    name: str
    config: OPTConfig
    head: str | None = "causal_lm"
    checkpoint: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "head": self.head,
            "parameters": sizes.parameters(self.config, self.head),
            "memory": sizes.memory(self.config, self.head),
            "checkpoint": self.checkpoint,
            "config": self.config.to_dict(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "opt-125m … opt-175b, galactica-125m … galactica-120b, a folder, a file, a hub id (default: all sizes)"
    add("sources", nargs="*", metavar="SOURCE", help=text)
    add_revision(add)
    add("--json", action="store_true", help="a JSON list with an object for each SOURCE; sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    from optjax.presets import PRESETS

    models = [_find(source, arguments.revision) for source in arguments.sources or PRESETS]
    if arguments.json:
        print(json.dumps([model.as_dict() for model in models], indent=2))
    else:
        from optjax.cli.tables import print_models

        print_models(models)
    return 0


def _find(source: str, revision: str | None) -> Model:
    """A path, a size or a hub id, in this order.

    Raises:
      FileNotFoundError: it is none of them.
      ValueError: the checkpoint is broken, or is no OPT model.
    """
    from optjax.presets import PRESETS

    if Path(source).expanduser().exists():
        return _read(source, Path(source).expanduser())
    if source.lower().removeprefix("facebook/") in PRESETS:
        return Model(source, OPTConfig.preset(source))
    if "/" not in source and source != "opt-mini":
        near = difflib.get_close_matches(source.lower(), PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"sizes are {', '.join(PRESETS)}"
        raise FileNotFoundError(f"no file, folder or published size is named {source!r}; {hint}")

    from optjax.checkpoints.hub import resolve_source

    return _read(source, resolve_source(source, revision=revision, weights=False))


def _read(name: str, path: Path) -> Model:
    from optjax.checkpoints.detect import find_checkpoint
    from optjax.checkpoints.open import open_checkpoint
    from optjax.checkpoints.quantized import config_entry

    try:
        find_checkpoint(path)
    except FileNotFoundError:
        if not path.is_dir() or not (path / "config.json").is_file():
            raise
        return Model(name, OPTConfig.from_json(path))  # a config without weights: of the hub, or written by hand
    opened = open_checkpoint(path)
    tensors = opened.plan.tensors.values()
    files = {
        "format": opened.found.format,
        "files": len(opened.found.files),
        "bytes": sum(file.stat().st_size for file in opened.found.files),
        "dtypes": sorted({tensor.dtype.name for tensor in tensors}),
        "weights": opened.nbytes,
        "quantization": None if opened.quantization is None else config_entry(opened.quantization),
        "tokenizer": any((opened.found.folder / file).is_file() for file in ("tokenizer.json", "merges.txt")),
    }
    return Model(name, opened.config, opened.head, files)
