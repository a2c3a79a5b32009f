"""LoRA and QLoRA as the loop sees them: adapters in the state, the frozen model beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax

from optjax import LoraConfig, OPTConfig, Params, init_adapters, merge_adapters, save_adapters, with_adapters

from ..adapters import AdapterState, abstract_adapter_state, compile_adapter_step, init_adapter_state
from ..optimizer import Recipe
from ..options import StepOptions
from ..stepping import Step, step_function
from .source import load_weights

ADAPTER = "adapter"


class LowRank:
    """Adapters beside a frozen model, which may be quantized; see `Trained`."""

    frozen = True

    def __init__(self, args: argparse.Namespace, config: OPTConfig, head: str, options: StepOptions):
        self._args, self._config, self._head, self._options = args, config, head, options
        self.params = load_weights(args, config, head, args.quantize, dtype=args.dtype)
        self._lora = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha or 2 * args.lora_r,
            lora_dropout=args.lora_dropout,
            target_modules=_targets(args.lora_target),
            base_model_name_or_path=str(args.model),
        )
        self.target = abstract_adapter_state(self.params, self._lora, options)
        said = {name: value for name, value in self._lora.to_dict().items() if value}
        self.about: dict[str, Any] = {"stacked": args.stacked, "quantize": args.quantize, "lora": said}

    def init(self) -> AdapterState:
        adapters = init_adapters(self.params, self._lora, jax.random.key(self._args.seed))
        return init_adapter_state(adapters, self._options)

    def make_step(self, recipe: Recipe, batch_size: int, seed: int) -> Step:
        def compile(state: AdapterState, batch: Any) -> Any:
            compiled = compile_adapter_step(state, self.params, batch, recipe, seed, self._options)
            return lambda state, batch: compiled(state, self.params, batch)

        return step_function(compile, self.params, batch_size)

    def model(self, state: AdapterState) -> Params:
        return with_adapters(self.params, state.adapters)

    def finished(self, state: AdapterState, folder: Path) -> Params:
        save_adapters(state.adapters, folder / ADAPTER)
        whole = self.params
        if self._args.quantize is not None or self._args.dtype != "float32":  # what is added would be rounded away
            whole = load_weights(self._args, self._config, self._head)
        return merge_adapters(whole, state.adapters)


def _targets(names: list[str] | None) -> list[str] | str | None:
    return "all-linear" if names == ["all-linear"] else names
