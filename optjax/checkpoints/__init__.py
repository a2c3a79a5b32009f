"""Checkpoints in and out: `load_params`, `load`, `save_params`, and `CheckpointError`."""

from optjax.checkpoints.errors import CheckpointError
from optjax.checkpoints.load import load, load_params
from optjax.checkpoints.save import save_params

__all__ = ["CheckpointError", "load", "load_params", "save_params"]
