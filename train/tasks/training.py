"""The run that the three fine-tuning scripts share: a task goes in, its best model comes out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optjax import OPTConfig, Params, Tokenizer
from optjax.sharding import initialize

from .. import settings
from ..checkpoint import restore_best
from ..data import open_examples
from ..export import export
from ..flags import step_options
from ..interrupt import STOPPED
from ..job import Job
from ..loop import run
from ..placing import rows
from ..run_file import remember_run
from ..state import check_batch
from ..stepping import model_flops
from . import flags
from .adapted import LowRank
from .trained import AllWeights

MODEL = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, and how well.

    Attributes:
      name: of the script.
      config, tokenizer: of the model, the config with the task's labels.
      head: as of `optjax.load_params`.
      examples: to train on; each a row of a batch, before it is padded.
      collate: examples to a batch of arrays.
      longest: tokens of the longest row that a batch may have.
      evaluate: figures of the validation data; None where there is none.
      better: the figure by which the best checkpoint is chosen, and ``"max"`` or ``"min"``.
      sample: texts that the model writes.
      about: what else the run's folder should remember.
    """

    name: str
    config: OPTConfig
    tokenizer: Tokenizer
    head: str
    examples: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, np.ndarray]]
    longest: int
    evaluate: Callable[[Params], dict[str, float]] | None
    better: tuple[str, str]
    sample: Callable[[Params], list[str]] | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


class Interrupted(Exception):
    """A run was told to stop by a signal, and has saved."""


def script(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, body: Callable[[argparse.Namespace], None]
) -> int:
    """Carries out a script; its exit status, or `SystemExit` where something is wrong."""
    args = settings.parse(parser, argv)
    try:
        flags.check(args)
        initialize()
        args.mesh = args.mesh or flags.default_mesh()
        body(args)
    except Interrupted:
        return STOPPED
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    return 0


def train(args: argparse.Namespace, task: Task) -> Params | None:
    """Trains, or goes on with what the folder ``args.run`` holds, and writes the best model to ``model/`` in it.

    Returns:
      That model; None where ``--stop-at`` comes before the run's end.

    Raises:
      Interrupted: a signal came before either.
      ValueError: something does not fit together, said before anything is compiled; or the folder holds another run.
    """
    options = step_options(args)
    per_epoch = len(task.examples) / args.batch_size
    total = max(1, math.ceil(args.epochs * per_epoch))
    recipe = flags.recipe(args, total)
    loop = flags.loop_options(args, total, max(1, round(per_epoch)))
    trained = (AllWeights if args.lora_r is None else LowRank)(args, task.config, task.head, options)
    check_batch(trained.params, args.batch_size, task.longest, options)
    loader = open_examples(
        task.examples,
        batch_size=args.batch_size,
        seed=args.seed,
        rows=rows(trained.params, args.batch_size),
        collate=task.collate,
    )
    length = round(sum(len(example["input_ids"]) for example in task.examples) / len(task.examples))
    evaluate, sample = task.evaluate, task.sample
    job = Job(
        target=trained.target,
        init=trained.init,
        step=trained.make_step(recipe, args.batch_size, args.seed),
        loader=loader,
        about=_about(args, task) | trained.about,
        tokens_per_step=args.batch_size * length,
        flops_per_step=model_flops(task.config, args.batch_size, length, task.head, frozen=trained.frozen),
        evaluate=None if evaluate is None else lambda state: evaluate(trained.model(state)),
        sample=None if sample is None else lambda state: sample(trained.model(state)),
        better=None if evaluate is None else task.better,
    )
    remember_run(args.run, job.about)  # before the settings of another run are written over
    settings.write(settings.resolved(args), args.run)
    try:
        state = run(job, args.run, loop)
    finally:
        loader.close()
    if int(state.step) < loop.last:
        raise Interrupted
    if int(state.step) < total:
        say(args, f"ended at step {int(state.step)}, as --stop-at asks; the model is written at step {total}")
        return None
    best = None if evaluate is None else restore_best(args.run, trained.target)
    state = state if best is None else best.state
    finished = trained.finished(state, args.run)
    export(finished, args.run / MODEL, args.export_dtype, task.tokenizer)
    say(args, f"wrote {args.run / MODEL}, of step {int(state.step)}")
    return finished


def _about(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    config = task.config.to_dict() | {"dropout": None}  # which may change on resume
    about = {"script": task.name, "model": str(args.model), "config": config, "seed": args.seed}
    return about | {"examples": len(task.examples)} | task.about


def first_process() -> bool:
    """Whether this one writes what all of them know."""
    return jax.process_index() == 0


def write_json(path: Path, found: Any) -> None:
    """Of several processes the first writes."""
    if first_process():
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(args: argparse.Namespace, text: str) -> None:
    """A line for the person at the terminal."""
    if not args.quiet and first_process():
        print(text, file=sys.stderr)


def figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
