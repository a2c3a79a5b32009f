"""Checkpoints of a training run: weights, optimizer and step, written by orbax.

A run's folder holds `checkpoints/<step>/`, and `run.json`, which says what was trained so that a resumed run cannot be
mistaken for another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from optjax.config import OPTConfig
from optjax.params import Params, unstack_layers

from .state import TrainState, abstract_state


class Checkpoints:
    """The checkpoints of one run; the latest `keep` stay. Use as a context manager: leaving it closes them."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        # Written before `save` returns: the next step gives the state's buffers away.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a state under its step; a step that is there already is left as it is."""
        step = int(state.step)
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, target: TrainState) -> TrainState:
        """The newest state, each array made where the target's shardings say.

        Args:
          target: of `abstract_state`; its mesh, rules and dtypes need not be those that the state was saved with.

        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        if self.latest is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder / 'checkpoints'}")
        restored: Any = self._manager.restore(self.latest, args=ocp.args.StandardRestore(target))
        return restored


def remember_run(folder: str | Path, about: dict[str, Any]) -> None:
    """Writes `run.json`, or checks that the one there says the same.

    Raises:
      ValueError: the folder belongs to another run; the message says what differs.
    """
    path = Path(folder) / "run.json"
    about = json.loads(json.dumps(about))
    if path.is_file():
        before = json.loads(path.read_text())
        differ = [k for k in sorted(before.keys() | about.keys()) if before.get(k) != about.get(k)]
        if differ:
            changes = "; ".join(f"{k} was {before.get(k)!r}, is {about.get(k)!r}" for k in differ)
            raise ValueError(f"{folder} holds another run ({changes}); take another folder, or the same options")
        return
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all have looked for run.json")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=2) + "\n")


def load_run(folder: str | Path) -> Params:
    """The weights of a run's newest checkpoint, layers in a list.

    Raises:
      FileNotFoundError: there is no run, or it has no checkpoint yet.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the folder of a run of optjax.train.pretrain")
    about = json.loads(path.read_text())
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(abstract_state(OPTConfig.from_dict(about["config"]), stacked=about["stacked"]))
    return unstack_layers(state.params)
