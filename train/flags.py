"""What the flags that training scripts share mean to the step, the recipe and the loop; and those of the log."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .job import LoopOptions
from .optimizer import Recipe
from .options import StepOptions

EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def add_output(add: Any) -> None:
    """Flags of where a run tells what of itself; ``add`` is a group's ``add_argument``."""
    on_or_off = argparse.BooleanOptionalAction
    add("--tensorboard", action=on_or_off, default=None, help="write event files (where tensorboardX is installed)")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--profile", type=int, nargs=2, metavar=("STEP", "N"), help="trace N steps from STEP on")
    add("--export-dtype", choices=EXPORT_DTYPES, default="float32", help="of the model that is written (float32)")
    add("--quiet", action=on_or_off, default=False, help="no progress on the terminal")


def step_options(args: argparse.Namespace) -> StepOptions:
    """The levers of the train step; those without a flag, or left open, at their defaults.

    Raises:
      ValueError: values that do not go together.
    """
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(StepOptions)}
    return StepOptions(**{name: value for name, value in given.items() if value is not None})


def recipe(
    args: argparse.Namespace, *, peak_lr: float, total_steps: int, warmup_steps: int, decay_from: int | None = None
) -> Recipe:
    """AdamW and its schedule.

    Raises:
      ValueError: a value that makes no sense.
    """
    return Recipe(
        peak_lr=peak_lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        decay_from=decay_from,
        final_fraction=args.final_fraction,
        beta1=args.betas[0],
        beta2=args.betas[1],
        eps=args.eps,
        weight_decay=args.weight_decay,
        clip_norm=args.clip,
    )


def loop_options(args: argparse.Namespace, **more: Any) -> LoopOptions:
    """How the loop goes, with what has no flag or another meaning in ``more``.

    Raises:
      ValueError: a value that makes no sense.
    """
    return LoopOptions(
        stop_at=args.stop_at,
        keep=args.keep,
        log_every=args.log_every,
        profile=None if args.profile is None else tuple(args.profile),
        tensorboard=args.tensorboard,
        wandb=args.wandb,
        quiet=args.quiet,
        **more,
    )
