"""The flags that the three fine-tuning scripts share, and what they mean to the train step."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from optjax.kernels.choice import IMPLEMENTATIONS
from optjax.quantization.quantize import KINDS
from optjax.sharding import RULES
from optjax.sharding.rules import DEFAULT_RULES

from .. import flags as shared
from ..flags import add_output
from ..job import LoopOptions
from ..optimizer import Recipe
from ..options import COMPUTE_DTYPES, DTYPES, MEMORIES, REMAT
from .lengths import TOO_LONG
from .table import check_writable

# Without adapters, and with them: few new weights bear, and need, larger steps than all old ones.
LR, LORA_LR = 5e-5, 2e-4

RECIPE = """\
AdamW with the usual values for fine-tuning: three epochs, a linear rise of the learning rate over the first 6% of the
steps, then a linear fall that would be at 0 one step after the last. For a model as small as opt-mini take a rate about
ten times as large.
"""


def make_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m optjax.train.{name}",
        usage=f"python -m optjax.train.{name} --model SOURCE --data FILE --run FOLDER [options]",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model(parser: argparse.ArgumentParser, suffixes: str) -> argparse._ArgumentGroup:
    """The flags of what is trained; returned for a script's own flags of its data."""
    group = parser.add_argument_group("what is trained, on what")
    add = group.add_argument
    text = "a folder, a hub id such as facebook/opt-125m, or opt-mini, which ships with optjax"
    add("--model", required=True, metavar="SOURCE", help=text)
    add("--tokenizer", metavar="SOURCE", help="where the tokenizer is, if not with the model")
    add("--data", type=Path, metavar="FILE", help=f"to train on: {suffixes}")
    add("--run", type=Path, metavar="FOLDER", help="checkpoints, log, report and the finished model (model/) go here")
    add("--validation", type=Path, metavar="FILE", help="another file, to choose the best checkpoint by")
    text = "of --data, drawn by --seed, held out for that where there is no --validation; 0: nothing (0.1)"
    add("--validation-fraction", type=float, default=0.1, metavar="X", help=text)
    return group


def add_prediction(parser: argparse.ArgumentParser, what: str) -> None:
    group = parser.add_argument_group("use of a finished model (alone with --model, or after training)")
    group.add_argument("--predict", type=Path, metavar="FILE", help=what)
    text = "where to write what is predicted: .jsonl, .csv or .tsv (beside --predict, its name with .predictions.jsonl)"
    group.add_argument("--predictions", type=Path, metavar="FILE", help=text)


def add_lengths(group: argparse._ArgumentGroup, too_long: tuple[str, ...] | None = TOO_LONG, text: str = "") -> None:
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of a row (the model's positions)")
    if too_long:
        group.add_argument("--too-long", choices=too_long, default="error", help=f"{text} (error)")


def add_training(parser: argparse.ArgumentParser, batch_size: int = 16) -> None:
    """The flags of how it is trained."""
    group = parser.add_argument_group("how long, and by what recipe", RECIPE)
    add = group.add_argument
    add("--epochs", type=float, default=3.0, metavar="X", help="passes over the data; 0.5 is half of one (3)")
    add("--batch-size", type=int, default=batch_size, metavar="N", help=f"rows per step ({batch_size})")
    add("--lr", type=float, metavar="X", help=f"peak learning rate ({LR:g}; with LoRA {LORA_LR:g})")
    add("--warmup-fraction", type=float, default=0.06, metavar="X", help="of all steps (0.06)")
    add("--final-fraction", type=float, default=0.0, metavar="X", help="of the peak, after the last step (0)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="not on biases and norms (0.01)")
    add("--betas", type=float, nargs=2, default=(0.9, 0.999), metavar=("B1", "B2"), help="(0.9 0.999)")
    add("--eps", type=float, default=1e-8, metavar="X", help="of AdamW (1e-8)")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient (1)")
    add("--dropout", type=float, metavar="P", help="(the model's)")
    add("--seed", type=int, default=0, metavar="N", help="of a new head, the order of the data, and dropout (0)")

    group = parser.add_argument_group("LoRA: train small adapters beside frozen weights; QLoRA: those in 8 or 4 bits")
    add = group.add_argument
    add("--lora-r", type=int, metavar="R", help="rank of the adapters; turns LoRA on")
    add("--lora-alpha", type=float, metavar="A", help="their product counts A / R times (2 R)")
    add("--lora-dropout", type=float, default=0.0, metavar="P", help="of what goes into them (0)")
    text = "modules that get one, such as q_proj v_proj fc1, or all-linear (q_proj v_proj); a new head is trained whole"
    add("--lora-target", nargs="+", metavar="NAME", help=text)
    add("--quantize", choices=KINDS, help="the frozen weights; needs --lora-r")

    group = parser.add_argument_group("over which devices, and how (all but --stacked may change on resume)")
    add = group.add_argument
    text = "such as fsdp=4,tensor=2; -1 is the rest (one device; of several processes all, fsdp=-1)"
    add("--mesh", metavar="SPEC", help=text)
    add("--rules", choices=list(RULES), help=f"what is split over which axis of the mesh ({DEFAULT_RULES})")
    text = "to compute in, and of frozen weights; what is trained is float32; float16: with loss scaling (float32)"
    add("--dtype", choices=COMPUTE_DTYPES, default="float32", help=text)
    add("--micro-batches", type=int, default=1, metavar="N", help="parts of a batch, taken one after another (1)")
    text = (
        "kept of each layer for the backward pass: all (none is recomputed), matrix products (dots), its input (full)"
    )
    add("--remat", choices=REMAT, default="none", help=f"{text} (none)")
    text = "scan over stacked layers: compiles faster, for deep models"
    add("--stacked", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "kernels of TPU and GPU (flash), or none; auto: flash where it can be had (eager)"
    add("--attn-implementation", choices=IMPLEMENTATIONS, default="eager", help=text)
    add("--moments-dtype", choices=DTYPES, default="float32", help="of AdamW's state (float32)")
    add("--moments-memory", choices=MEMORIES, default="device", help="where AdamW's state is (device)")


def default_mesh() -> str | None:
    """None, one device; but all where there are several processes, which train one model."""
    return "fsdp=-1" if jax.process_count() > 1 else None


def add_log(parser: argparse.ArgumentParser) -> None:
    """The flags of what a run writes on its way."""
    group = parser.add_argument_group("log and checkpoints")
    add = group.add_argument
    add("--log-every", type=int, default=10, metavar="STEPS", help="(10)")
    add("--eval-every", type=int, metavar="STEPS", help="validation; the best checkpoint stays (once an epoch)")
    add("--eval-batch-size", type=int, metavar="N", help="rows (--batch-size)")
    add("--save-every", type=int, metavar="STEPS", help="to go on from after a crash (as --eval-every)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints that stay, beside the best (2)")
    add("--stop-at", type=int, metavar="STEP", help="stop early, with the schedule unchanged")
    add_output(add)


def loop_options(args: argparse.Namespace, total_steps: int, per_epoch: int) -> LoopOptions:
    """How the loop goes. The small batches of a fine-tuning have losses too uneven to call some of them spikes."""
    every = args.eval_every or min(per_epoch, total_steps)
    save = args.save_every or every
    return shared.loop_options(args, total_steps=total_steps, save_every=save, eval_every=every, spikes=None)


def recipe(args: argparse.Namespace, total_steps: int) -> Recipe:
    """The recipe of a run of so many steps.

    Raises:
      ValueError: a value that makes no sense.
    """
    if not 0 <= args.warmup_fraction <= 1:
        raise ValueError(f"--warmup-fraction should lie in [0, 1], not {args.warmup_fraction}")
    rate = args.lr or (LORA_LR if args.lora_r else LR)
    warmup = round(args.warmup_fraction * total_steps)
    # As transformers' schedule falls: from the first step after the warm-up to an end that lies after the last step. A
    # last step at a rate of 0 would change nothing, and it may be the only one.
    return shared.recipe(args, peak_lr=rate, total_steps=total_steps + 1, warmup_steps=warmup, decay_from=warmup + 1)


def check(args: argparse.Namespace) -> None:
    """Whether the flags go together.

    Raises:
      ValueError: they do not.
    """
    if args.data is None and args.predict is None:
        raise ValueError("give --data and --run to train, or --predict to use a finished model")
    if args.data is not None and args.run is None:
        raise ValueError("--data needs --run, the folder of the run")
    if args.predict is not None:
        if not args.predict.is_file():
            raise FileNotFoundError(f"no file {args.predict}")
        predictions_path(args)
    for name in ("epochs", "batch_size"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} should be greater than 0, not {getattr(args, name)}")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(f"--validation-fraction should lie in [0, 1), not {args.validation_fraction}")
    if args.lora_r is None:
        given = [name for name in ("lora_alpha", "lora_target", "quantize") if getattr(args, name) is not None]
        if given and not (given == ["quantize"] and args.data is None):
            raise ValueError(
                f"--{given[0].replace('_', '-')} needs --lora-r: quantized weights do not train themselves"
            )


def predictions_path(args: argparse.Namespace) -> Path:
    """Where ``--predict`` is answered; ``.json`` is SQuAD's own format of answers.

    Raises:
      ValueError: its suffix does not say how it is to be written.
    """
    if args.predictions is not None and args.predictions.suffix == ".json" and hasattr(args, "doc_stride"):
        return args.predictions
    return check_writable(args.predictions or args.predict.with_name(f"{args.predict.stem}.predictions.jsonl"))
