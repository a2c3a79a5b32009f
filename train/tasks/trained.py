"""What a fine-tuning trains: all weights, or adapters beside frozen ones; the two look the same to the loop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Protocol

from optjax import OPTConfig, Params
from optjax.sharding import make_mesh

from ..optimizer import Recipe
from ..options import StepOptions
from ..state import TrainState, abstract_state, compile_step, init_state
from ..stepping import Step, step_function
from .source import load_weights


class Trained(Protocol):
    """Attributes:
    params: the weights that batches are placed beside; abstract where they are in the state.
    target: the state without its values, for restoring.
    about: what a run's folder remembers of it.
    frozen: whether the model's own weights have no gradient.
    """

    params: Params
    target: Any
    about: dict[str, Any]
    frozen: bool

    def init(self) -> Any:
        """The state before the first step."""
        ...

    def make_step(self, recipe: Recipe, batch_size: int, seed: int) -> Step:
        """As of `step_function`."""
        ...

    def model(self, state: Any) -> Params:
        """The model as it is trained so far, for every function of params."""
        ...

    def finished(self, state: Any, folder: Path) -> Params:
        """The model to be written, in plain weights; anything else that it gives is written to the folder."""
        ...


class AllWeights:
    """Full fine-tuning."""

    frozen = False

    def __init__(self, args: argparse.Namespace, config: OPTConfig, head: str, options: StepOptions):
        mesh = None if args.mesh is None else make_mesh(args.mesh)
        self._args, self._config, self._head, self._options = args, config, head, options
        spread: dict[str, Any] = {"mesh": mesh, "rules": args.rules, "stacked": args.stacked}
        self.target = abstract_state(config, options, head=head, **spread)
        self.params = self.target.params
        self.about: dict[str, Any] = {"stacked": args.stacked}

    def init(self) -> TrainState:
        return init_state(load_weights(self._args, self._config, self._head), self._options)

    def make_step(self, recipe: Recipe, batch_size: int, seed: int) -> Step:
        def compile(state: TrainState, batch: Any) -> Any:
            return compile_step(state, batch, recipe, seed, self._options)

        return step_function(compile, self.params, batch_size)

    def model(self, state: TrainState) -> Params:
        return state.params

    def finished(self, state: TrainState, folder: Path) -> Params:
        return state.params
