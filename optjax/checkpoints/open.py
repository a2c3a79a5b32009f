"""A checkpoint with its headers read and checked against its config, and none of its weights read yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optjax.checkpoints.contents import Contents, open_contents
from optjax.checkpoints.derive import derive_config
from optjax.checkpoints.detect import Found, find_checkpoint
from optjax.checkpoints.errors import CheckpointError, reading, shorten
from optjax.checkpoints.match import Match, choose_head, match
from optjax.checkpoints.quantized import split_config
from optjax.config import OPTConfig
from optjax.quantization.quantize import Quantization


@dataclass
class Opened:
    """A checkpoint that is complete: its files, its config, its head, and the tensor of every weight."""

    found: Found
    config: OPTConfig
    head: str | None
    plan: Match
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        """Of the weights as they lie in the files."""
        plan = self.plan
        every = (plan.tensors, plan.scales, plan.column_scales)
        return sum(tensor.nbytes for each in every for tensor in each.values())

    @property
    def dtype(self) -> np.dtype:
        """Of the weights that are never quantized."""
        return self.plan.tensors["embed_positions.weight", None].dtype


def open_checkpoint(
    path: Path,
    head: str | None = None,
    config: OPTConfig | str | None = None,
    *,
    create_head: bool = False,
    new_head: bool = False,
) -> Opened:
    """The checkpoint at a path; head, config and new_head as of `load_params`.

    Raises:
      FileNotFoundError: no checkpoint, or no config, is there.
      ValueError: there is no such head or preset.
      CheckpointError: a file is broken, or tensors do not fit the config. A head that the files lack is one of those,
        unless ``create_head``.
    """
    found = find_checkpoint(path)
    contents = open_contents(found)
    config, quantization = _config(config, found.folder, contents)
    head = choose_head(_said_of_head(config, found.folder), contents) if head is None else head
    head = None if head == "base" else head
    if new_head and head in (None, "causal_lm"):
        raise ValueError("new_head=True is for a classifier or for answers to questions; this is a language model")
    plan = match(contents, config, head, create_head=create_head, new_head=new_head, quantization=quantization)
    return Opened(found, config, head, plan, quantization)


def _said_of_head(config: OPTConfig, folder: Path) -> OPTConfig:
    """The config that says which head is in the folder: its own. Another, of the model that this one was made of, say,
    is passed for the sizes."""
    try:
        return OPTConfig.from_json(folder)
    except (OSError, ValueError):  # none is there, or one that a config is passed in place of
        return config


def _config(given: OPTConfig | str | None, folder: Path, contents: Contents) -> tuple[OPTConfig, Quantization | None]:
    if isinstance(given, OPTConfig):
        return split_config(given, folder)
    if isinstance(given, str):
        return OPTConfig.preset(given), None
    if given is not None:
        raise ValueError(f"config should be an OPTConfig or the name of a preset, not {type(given).__name__}")
    if (folder / "config.json").is_file():
        try:
            config = OPTConfig.from_json(folder)
        except Exception as error:  # Values of the wrong type can fail in any way.
            raise CheckpointError(f"{folder / 'config.json'}: {shorten(str(error), 1000)}") from error
        return split_config(config, folder)
    with reading(folder):
        derived = derive_config(contents.tensors, contents.arguments)
    if derived is not None:
        return derived, None
    raise FileNotFoundError(
        f"{folder} has no config.json: pass config=, an OPTConfig or the name of a preset such as 'opt-125m'"
    )
