"""Opens a checkpoint of any format: its tensors under the names of transformers' PyTorch models, none read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from optjax.checkpoints.detect import Found
from optjax.checkpoints.safetensors_reader import read_safetensors
from optjax.checkpoints.tensors import TensorRef
from optjax.checkpoints.torch_reader import read_torch
from optjax.config import OPTConfig


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
      tensors: by name, weights ``[out, in]``.
      problems: what is wrong already, to be reported with the rest.
      config: where the checkpoint carries its own (metaseq).
    """

    tensors: dict[str, TensorRef]
    problems: list[str] = field(default_factory=list)
    config: OPTConfig | None = None


def open_contents(found: Found) -> Contents:
    """The tensors of a checkpoint.

    Raises:
      CheckpointError: a file is broken.
    """
    return _open_files(found, _READERS[found.format])


_READERS: dict[str, Callable[[Path], dict[str, TensorRef]]] = {"safetensors": read_safetensors, "torch": read_torch}


def _open_files(found: Found, read: Callable[[Path], dict[str, TensorRef]]) -> Contents:
    contents = Contents({})
    for path in found.files:
        for name, tensor in read(path).items():
            if name in contents.tensors:
                contents.problems.append(f"{name} is in {path.name} and in another file too")
            contents.tensors[name] = tensor
    return contents
