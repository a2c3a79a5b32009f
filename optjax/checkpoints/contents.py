"""Opens a checkpoint of any format: its tensors under the paths of the declaration, none read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optjax.checkpoints.detect import Found
from optjax.checkpoints.errors import shorten
from optjax.checkpoints.flax_reader import read_flax
from optjax.checkpoints.hdf5_reader import read_hdf5
from optjax.checkpoints.metaseq_reader import read_metaseq
from optjax.checkpoints.names import canonical
from optjax.checkpoints.npy_reader import read_npy
from optjax.checkpoints.safetensors_reader import read_safetensors
from optjax.checkpoints.tensors import TensorRef
from optjax.checkpoints.torch_reader import read_torch


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
      tensors: by the declaration's path with the layer's number filled in; matrices ``[out, in]``.
      problems: what is wrong already, to be reported with the rest.
      arguments: of the training, where the checkpoint holds them (metaseq); inert data.
    """

    tensors: dict[str, TensorRef]
    problems: list[str] = field(default_factory=list)
    arguments: Any = None

    def add(self, tensors: dict[str, TensorRef], where: str) -> None:
        """Takes in the tensors of a file, under whichever names they have there."""
        for name, tensor in tensors.items():
            path, tensor = canonical(name, tensor)
            if path is not None and path in self.tensors:
                self.problems.append(f"{shorten(name)} in {where} is there already, under this or another prefix")
            elif path is not None:
                self.tensors[path] = tensor


def open_contents(found: Found) -> Contents:
    """The tensors of a checkpoint.

    Raises:
      CheckpointError: a file is broken.
    """
    if found.format == "metaseq":
        return _open_metaseq(found)
    contents = Contents({})
    for path in found.files:
        contents.add(_READERS[found.format](path), path.name)
    return contents


_READERS: dict[str, Callable[[Path], dict[str, TensorRef]]] = {
    "safetensors": read_safetensors,
    "torch": read_torch,
    "flax": read_flax,
    "tf": read_hdf5,
    "npy": read_npy,
}


def _open_metaseq(found: Found) -> Contents:
    tensors, arguments = read_metaseq(found.files)
    contents = Contents({}, arguments=arguments)
    contents.add(tensors, found.files[0].name)
    return contents
