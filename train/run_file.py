"""`run.json`: what a run's folder is of, so that a resumed run cannot be mistaken for another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from optjax.config import OPTConfig
from optjax.params import Params, unstack_layers

from .barrier import together
from .checkpoint import Checkpoints
from .state import abstract_state


def remember_run(folder: str | Path, about: dict[str, Any]) -> None:
    """Writes `run.json`, or checks that the one there says the same.

    Raises:
      ValueError: the folder belongs to another run; the message says what differs.
    """
    path = Path(folder) / "run.json"
    about = json.loads(json.dumps(about))
    before = json.loads(path.read_text()) if path.is_file() else None
    # All look before the first writes, and none goes on before it has: else some would see a file that others did not.
    together("all have looked for run.json")
    if before is None and jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(about, indent=2) + "\n")
        partial.rename(path)
    together("run.json is there")
    if before is not None and before != about:
        changes = "; ".join(_changes(before, about))
        raise ValueError(f"{folder} holds another run ({changes}); take another folder, or the same options")


def _changes(before: dict[str, Any], about: dict[str, Any], within: str = "") -> Iterator[str]:
    """What differs, of a config the fields that do."""
    for key in sorted(before.keys() | about.keys()):
        old, new = before.get(key), about.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{within}{key}.")
        elif old != new:
            yield f"{within}{key} was {old!r}, is {new!r}"


def load_run(folder: str | Path) -> Params:
    """The weights of a run's newest checkpoint, layers in a list.

    Raises:
      FileNotFoundError: there is no run, or it has no checkpoint yet.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the folder of a run of optjax.train.pretrain")
    about = json.loads(path.read_text())
    with Checkpoints(folder, read_only=True) as checkpoints:
        state = checkpoints.restore(abstract_state(OPTConfig.from_dict(about["config"]), stacked=about["stacked"]))
    return unstack_layers(state.params)
