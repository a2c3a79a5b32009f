"""The pretraining of a causal language model as a `Job` for the loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import optjax
from optjax.config import OPTConfig
from optjax.params import Params, init_params
from optjax.sharding import make_mesh

from .data import open_text, text_batches
from .data.store import check_tokenizers, read_about
from .data.text import Sources, with_weights
from .job import Job, LoopOptions
from .loop import run
from .loss import evaluate
from .optimizer import Recipe
from .options import PLAIN, StepOptions
from .placing import rows
from .run_file import remember_run
from .settings import write as write_settings
from .state import TrainState, abstract_state, check_batch, compile_step, init_state
from .stepping import model_flops, step_function

# Of a sample text at an evaluation.
SAMPLE_TOKENS = 64
# Of the config, when a run goes on.
MAY_CHANGE = ("dropout", "attention_dropout", "layerdrop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A run, apart from its model, its recipe and its text.

    Attributes:
      batch_size: B, rows of a step over all devices.
      length: T; by default as many as the model has positions.
      seed: of the weights, the order of the text, and dropout.
      stacked: layers in one array for each weight, over which the step scans: compiles faster.
      mesh, rules: as of `optjax.sharding.make_mesh` and `make_placement`; without a mesh it takes one device.
      step: how a step is computed.
      init_scheme: as of `optjax.init_params`.
      weights: a checkpoint to begin with (as of `optjax.load_params`), in place of new weights.
      boundaries: documents of a row do not see each other.
      eval_batches: of the validation text, from its beginning, in `batch_size` rows each.
    """

    batch_size: int
    length: int | None = None
    seed: int = 0
    stacked: bool = False
    mesh: str | None = None
    rules: Any = None
    step: StepOptions = PLAIN
    init_scheme: str = "paper"
    weights: str | None = None
    boundaries: bool = False
    eval_batches: int = 16


def pretrain(
    config: OPTConfig,
    recipe: Recipe,
    options: Options,
    text: Sources,
    folder: str | Path,
    loop: LoopOptions,
    *,
    validation: str | Path | None = None,
    tokenizer: Any = None,
    prompts: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> TrainState:
    """Trains from the newest checkpoint in ``folder`` if it has one, as `optjax.train.loop.run` does.

    Args:
      text: what `python -m optjax.train.pack` wrote, or several with their weights.
      validation: the same, to evaluate on.
      tokenizer: an `optjax.Tokenizer`, for sample texts that continue the prompts at evaluations.
      settings: kept in the folder as `settings.json`.

    Raises:
      ValueError: the folder holds another run, records are longer than the model's positions, the tokenizer has more
        entries than the model, the validation was packed with another tokenizer than the text, or something does not
        divide over the mesh.
      FileNotFoundError: the text is not there.
    """
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    spread: dict[str, Any] = {"stacked": options.stacked, "mesh": mesh, "rules": options.rules}
    target = abstract_state(config, options.step, **spread)
    length = options.length or config.max_position_embeddings
    check_batch(target.params, options.batch_size, length, options.step)
    of_process = {"rows": rows(target.params, options.batch_size), "boundaries": options.boundaries}
    batches = {"length": length, "batch_size": options.batch_size, "vocab_size": config.vocab_size}
    evaluate, sample = _evaluate(validation, target.params, options, batches), _sample(tokenizer, prompts, config)
    if validation is not None:
        named = [path for path, _ in with_weights(text)]
        check_tokenizers({Path(path): read_about(Path(path)) for path in (*named, validation)})
    loader = open_text(text, seed=options.seed, **batches, **of_process)

    def compile(state: TrainState, batch: Any) -> Any:
        return compile_step(state, batch, recipe, options.seed, options.step)

    job = Job(
        target=target,
        init=lambda: init_state(_first_weights(config, options, spread), options.step),
        step=step_function(compile, target.params, options.batch_size),
        loader=loader,
        about=_about(config, options, folder),
        tokens_per_step=options.batch_size * length,
        flops_per_step=model_flops(config, options.batch_size, length),
        evaluate=evaluate,
        sample=sample,
    )
    remember_run(folder, job.about)  # before the settings of another run are written over
    if settings is not None:
        write_settings(settings, folder)
    with loader:
        return run(job, folder, loop)


def _about(config: OPTConfig, options: Options, folder: str | Path) -> dict[str, Any]:
    """What a run cannot change on the way. Of what it can, that is the value that it began with."""
    path = Path(folder) / "run.json"
    begun = json.loads(path.read_text(encoding="utf-8")).get("config", {}) if path.is_file() else {}
    shown = config.to_dict() | {name: begun[name] for name in MAY_CHANGE if name in begun}
    about = {"config": shown, "seed": options.seed, "stacked": options.stacked}
    return about | ({"init": options.init_scheme} if options.weights is None else {"weights": options.weights})


def _first_weights(config: OPTConfig, options: Options, spread: dict[str, Any]) -> Params:
    if options.weights is None:
        return init_params(config, jax.random.key(options.seed), scheme=options.init_scheme, **spread)
    return optjax.load_params(options.weights, "float32", "causal_lm", config=config, **spread)


def _evaluate(
    validation: str | Path | None, params: Params, options: Options, batches: dict[str, Any]
) -> Callable | None:
    if validation is None:
        return None
    # A forward pass takes as many rows as one of training does; the text measured is the same in any number of parts.
    parts = options.step.micro_batches
    size, count = options.batch_size // parts, options.eval_batches * parts
    how: dict[str, Any] = {**batches, "batch_size": size, "rows": rows(params, size), "boundaries": options.boundaries}
    text = text_batches(validation, max_batches=count, **how)
    return lambda state: evaluate(
        state.params, text, options.step, batch_size=size, bytes_per_token=text.bytes_per_token
    )


def _sample(tokenizer: Any, prompts: Sequence[str], config: OPTConfig) -> Callable | None:
    """Of the prompts that leave room for an answer."""
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}")
    prompts = [text for text in prompts if len(tokenizer.encode(text)) < config.max_position_embeddings]
    if not prompts:
        return None
    ids, mask = tokenizer(prompts)
    new = min(SAMPLE_TOKENS, config.max_position_embeddings - int(mask.sum(1).max()))
    quiet = {"suppress_tokens": tokenizer.unused_ids(config.vocab_size)}

    def sample(state: TrainState) -> list[str]:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        more = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "key": key}
        made = optjax.generate(state.params, ids, mask, max_new_tokens=new, **quiet, **more)
        texts = (tokenizer.decode(row[ids.shape[1] :]) for row in jax.device_get(made))
        return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]

    return sample
