"""Pretrains an OPT model: from text to a finished run, on one device or many, that nothing kills.

  python -m optjax.train.pretrain --preset opt-125m --data corpus.jsonl

is the paper's recipe on the devices at hand. Text is packed first (python -m optjax.train.pack does that alone, once
for many runs). Every setting can be given, on the command line or in a file (--settings run.toml):

  python -m optjax.train.pretrain --config config.json --data packed --run runs/first --steps 2000 --lr 1e-3

Over many hosts, the same command on each (train/launchers has scripts that start it):

  python -m optjax.train.pretrain --preset opt-175b --data web=0.8 books=0.2 --run /shared/run

Run the same command again to go on where it stopped: after a crash from the last checkpoint, after ctrl-c or SIGTERM
from the very step. A run that stopped and went on ends in the same bits as one that did not. It may go on over another
mesh and other processes.

Exit status: 0 when the run is finished, or at --stop-at; 75 when it was told to stop and has saved; 2 when the command
is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import jax

from optjax.config import OPTConfig
from optjax.kernels.choice import IMPLEMENTATIONS
from optjax.sharding import RULES, initialize
from optjax.sharding.rules import DEFAULT_RULES

from . import flags, settings
from .divergence import Diverged, Spikes
from .fit import fit
from .interrupt import STOPPED
from .job import LoopOptions
from .optimizer import Recipe
from .options import COMPUTE_DTYPES, DTYPES, MEMORIES, REMAT
from .pretraining import Options, pretrain
from .recipes import RECIPES, recipe_for
from .sources import packed, tokenizer_of

PROMPTS = ("The old house stood at the end of the road, and", "In the beginning")
# Of a run without a preset.
DEFAULTS: dict[str, Any] = {
    "batch_size": 16,
    "lr": 6e-4,
    "final_fraction": 0.1,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
    "init": "paper",
    "dtype": "float32",
    "remat": "none",
    "stacked": False,
}
WARMUP = 2000
# At most so much of a run is warm-up where none is asked for: for short runs.
WARMUP_FRACTION = 0.1
# Two flags for one thing.
PAIRS = (("steps", "tokens"), ("warmup", "warmup_tokens"))
# What follows from a flag where nobody gives it; from a preset, all.
FOLLOWS = {
    "config": {"length", "run"},
    **dict.fromkeys(("steps", "tokens"), {"warmup"}),
    **dict.fromkeys(("batch_size", "length"), {"steps", "warmup"}),
}


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = settings.parse(parser, argv, beaten)
    try:
        initialize()
        resolve(args)
        config = _config(args)
        recipe = _recipe(args)
        options = _options(args, config)
        loop = _loop(args, recipe)
        text = packed(args.data, args.tokenizer, args.run / "text", text_field=args.text_field, quiet=args.quiet)
        tokenizer = tokenizer_of(text, args.tokenizer, quiet=args.quiet)
        validation = _validation(args)
        more = {"validation": validation, "tokenizer": tokenizer, "prompts": args.prompts}
        state = pretrain(config, recipe, options, text, args.run, loop, settings=settings.resolved(args), **more)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (Diverged, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if int(state.step) < loop.last:
        return STOPPED
    if args.export is not None and loop.last == recipe.total_steps:
        from .export import export

        export(state.params, args.export, args.export_dtype, tokenizer)
        if jax.process_index() == 0:
            print(f"wrote {args.export}", file=sys.stderr)
    return 0


def _validation(args: argparse.Namespace) -> Path | None:
    if args.validation is None:
        return None
    how = {"text_field": args.text_field, "quiet": args.quiet, "beside": args.data}
    [(path, _)] = packed([args.validation], args.tokenizer, args.run / "text", **how)
    return path


def beaten(given: AbstractSet[str], found: Mapping[str, Any]) -> set[str]:
    """The settings of a file that make way for flags of other names: those that say the same thing another way, and
    those that nobody gave, where what they followed from is given now."""
    other = {b for pair in PAIRS for a, b in (pair, pair[::-1]) if a in given}
    filled = set(found.get(settings.FILLED, ())) or _of_preset(found)
    follow = filled if "preset" in given else {name for flag in FOLLOWS.keys() & given for name in FOLLOWS[flag]}
    return other | (follow & filled)


def _of_preset(found: Mapping[str, Any]) -> set[str]:
    """Of a file that does not say what was filled in: the settings that are as its preset has them."""
    recipe = RECIPES.get(str(found.get("preset")).lower().removeprefix("facebook/"), {})
    return {name for name, value in recipe.items() if settings.plain(value) == found.get(name)}


def resolve(args: argparse.Namespace) -> None:
    """Fills in, in place, what a flag or the settings file leave open: from the preset, else from `DEFAULTS`.

    What depends on the devices at hand (mesh, micro-batches) stays open: see `optjax.train.fit`. What was filled in and
    did not follow from a flag is listed as ``filled``.

    Raises:
      ValueError: no model, or no end of the run, or one thing said in two ways.
    """
    given = {name for name, value in vars(args).items() if value is not None}
    found = DEFAULTS if args.preset is None else recipe_for(args.preset)
    if "config" not in given and args.preset is None:
        raise ValueError("which model? give --preset opt-125m … opt-175b, or --config with a config.json or a size")
    for pair in PAIRS:
        if given.issuperset(pair):
            one, other = (f"--{name.replace('_', '-')}" for name in pair)
            raise ValueError(f"give {one} or {other}, not both")
    for name, value in found.items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    if args.config is None:
        args.config = args.preset
    config = _config(args)
    args.length = args.length or config.max_position_embeddings
    a_step = args.batch_size * args.length
    if "steps" not in given:
        if args.tokens is None:
            raise ValueError("how long? give --steps or --tokens")
        args.steps = math.ceil(args.tokens / a_step)
    args.tokens = None
    if args.warmup is None:
        warmup = WARMUP if args.warmup_tokens is None else math.ceil(args.warmup_tokens / a_step)
        short = "warmup_tokens" not in given
        args.warmup = min(warmup, max(1, int(WARMUP_FRACTION * args.steps))) if short else warmup
    args.warmup_tokens = None
    if args.run is None:
        args.run = Path("runs") / Path(str(args.preset or args.config)).name.removesuffix(".json")
    folded = {name for name, tokens in PAIRS if tokens in given}
    new = {name for name, value in vars(args).items() if value is not None} - given - folded
    args.filled = sorted(new | set(getattr(args, settings.FILLED, ())))


def _config(args: argparse.Namespace) -> OPTConfig:
    is_file = Path(args.config).exists()
    config = OPTConfig.from_json(args.config) if is_file else OPTConfig.preset(args.config)
    names = ("dropout", "attention_dropout", "layerdrop")
    return config.replace(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def _recipe(args: argparse.Namespace) -> Recipe:
    schedule = {"total_steps": args.steps, "warmup_steps": args.warmup, "decay_from": args.decay_from}
    return flags.recipe(args, peak_lr=args.lr, **schedule)


def _options(args: argparse.Namespace, config: OPTConfig) -> Options:
    step = flags.step_options(args)
    batch = {"batch_size": args.batch_size, "length": args.length}
    found = fit(config, step, mesh=args.mesh, rules=args.rules, micro_batches=args.micro_batches, **batch)
    if found.needed > found.capacity and not args.quiet and jax.process_index() == 0:
        needed, has = (f"{each / 2**30:.1f} GiB" for each in (found.needed, found.capacity))
        print(f"by estimate this takes {needed} of a device's {has}; optjax plan asks the compiler", file=sys.stderr)
    return Options(
        **batch,
        seed=args.seed,
        stacked=args.stacked,
        mesh=found.mesh,
        rules=args.rules,
        step=dataclasses.replace(step, micro_batches=found.micro_batches),
        init_scheme=args.init,
        weights=args.weights,
        boundaries=args.boundaries,
        eval_batches=args.eval_batches,
    )


def _loop(args: argparse.Namespace, recipe: Recipe) -> LoopOptions:
    every = {"save_every": args.save_every, "eval_every": args.eval_every}
    return flags.loop_options(args, total_steps=recipe.total_steps, spikes=Spikes() if args.spikes else None, **every)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.pretrain",
        usage="%(prog)s (--preset SIZE | --config FILE) --data PATH [PATH ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_or_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("what is trained, on what").add_argument
    add("--preset", metavar="SIZE", help=f"the paper's recipe for {', '.join(RECIPES)}; flags change it")
    add("--config", metavar="FILE", help="config.json, or a size such as opt-125m (that of the preset)")
    text = "packed text (the folder of optjax.train.pack), or what it packs; several with weights: web=0.8 books=0.2"
    add("--data", nargs="+", required=True, metavar="PATH[=WEIGHT]", help=text)
    add("--validation", metavar="PATH", help="another one, measured every --eval-every steps")
    text = "folder, hub id or opt-mini: packs text, writes samples, goes with --export"
    text = f"{text} (that of packed --data; to pack all of it facebook/opt-125m)"
    add("--tokenizer", metavar="SOURCE", help=text)
    add("--text-field", default="text", metavar="NAME", help="of text that is packed first (text)")
    add("--boundaries", action=on_or_off, default=False, help="documents of a row do not see each other")
    add("--run", type=Path, metavar="FOLDER", help="checkpoints and logs go here (runs/, and the model's name)")
    add("--weights", metavar="SOURCE", help="begin with those of a checkpoint: folder or hub id")
    add("--seed", type=int, default=0, help="of the weights, the order of the data, and dropout (0)")
    add("--init", choices=["hf", "paper"], help="initialization scheme (paper)")

    add = parser.add_argument_group("over which devices, and how (all but --stacked may change on resume)").add_argument
    add("--mesh", metavar="SPEC", help="such as fsdp=32,tensor=8; -1 is the rest (chosen for the devices at hand)")
    add("--rules", choices=list(RULES), help=f"what is split over which axis of the mesh ({DEFAULT_RULES})")
    text = (
        "to compute in; weights stay float32; float16 comes with dynamic loss scaling (float32, of a preset bfloat16)"
    )
    add("--dtype", choices=COMPUTE_DTYPES, help=text)
    add("--micro-batches", type=int, help="parts of a batch, one after another (chosen for the devices at hand)")
    text = (
        "kept of each layer for the backward pass: none is recomputed, matrix products are kept (dots), the input is "
        "(full), or is in the host's memory (offload) (none; of a preset full)"
    )
    add("--remat", choices=REMAT, help=text)
    add("--stacked", action=on_or_off, help="scan over stacked layers: compiles faster (not; of a preset yes)")
    add("--query-block", type=int, metavar="N", help="queries attended at a time; 0: all (512 of 1024 and more)")
    text = "kernels of TPU and GPU (flash), or none; auto: flash where it can be had (eager)"
    add("--attn-implementation", choices=IMPLEMENTATIONS, default="eager", help=text)
    add("--loss-chunks", type=int, metavar="N", help="parts of a row whose logits exist together (by their size)")
    add("--moments-dtype", choices=DTYPES, default="float32", help="of AdamW's state (float32)")
    add("--moments-memory", choices=MEMORIES, default="device", help="where AdamW's state is (device)")

    add = parser.add_argument_group("how long").add_argument
    add("--steps", type=int, metavar="N", help="steps in all; the learning rate ends its fall there")
    add("--tokens", type=float, metavar="N", help="the same in tokens (of a preset 300e9)")
    add("--stop-at", type=int, metavar="STEP", help="stop early, with the schedule unchanged")
    add("--batch-size", type=int, metavar="N", help="rows of a step, over all devices (16; of a preset the paper's)")
    add("--length", type=int, metavar="N", help="tokens of a row (max_position_embeddings); may change on resume")

    group = parser.add_argument_group("recipe (AdamW, as of the OPT paper; all of it may change on resume)")
    add = group.add_argument
    add("--lr", type=float, help="peak learning rate (6e-4; of a preset the paper's)")
    add("--warmup", type=int, metavar="STEPS", help="linear warm-up (2000, at most a tenth of the run)")
    add("--warmup-tokens", type=float, metavar="N", help="the same in tokens (of a preset 375e6)")
    add("--decay-from", type=int, metavar="STEP", help="keep the peak until this step (end of warm-up)")
    add("--final-fraction", type=float, metavar="X", help="of the peak, at the last step (0.1)")
    add("--weight-decay", type=float, metavar="X", help="not on biases and norms (0.1)")
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="(0.9 0.95)")
    add("--eps", type=float, metavar="X", help="(1e-8)")
    add("--clip", type=float, metavar="X", help="largest norm of the gradient (1.0)")
    for name in ("dropout", "attention-dropout", "layerdrop"):
        add(f"--{name}", type=float, metavar="P", help="(the config's)")

    add = parser.add_argument_group("log and checkpoints").add_argument
    add("--log-every", type=int, default=10, metavar="STEPS", help="(10)")
    add("--eval-every", type=int, default=200, metavar="STEPS", help="(200)")
    add("--eval-batches", type=int, default=16, metavar="N", help="of --validation, from its beginning (16)")
    add("--prompts", nargs="*", default=list(PROMPTS), metavar="TEXT", help="continued at evaluations (two)")
    add("--save-every", type=int, default=200, metavar="STEPS", help="(200)")
    add("--keep", type=int, default=3, metavar="N", help="checkpoints that stay (3)")
    add("--spikes", action=on_or_off, default=True, help="go back when the loss or the gradient leaps (yes)")
    add("--export", type=Path, metavar="FOLDER", help="at the end, write a Hugging Face checkpoint here")
    flags.add_output(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
