"""Pretrains an OPT model on packed text.

  python -m optjax.train.pack --documents train.jsonl --tokenizer folder --out packed/train
  python -m optjax.train.pretrain --config config.json --data packed/train --run runs/first --steps 2000

Over many devices, the same command started on every host:

  python -m optjax.train.pretrain --config opt-175b --data packed/train --run /shared/run --steps 143000 --stacked \\
    --batch-size 1024 --micro-batches 32 --mesh fsdp=32,tensor=8 --dtype bfloat16 --remat full

Run the same command again to go on where it stopped: after a crash from the last checkpoint, after ctrl-c or SIGTERM
from the very step. A run that stopped and went on ends in the same bits as one that did not. It may go on over another
mesh.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optjax.config import OPTConfig
from optjax.kernels.choice import IMPLEMENTATIONS
from optjax.params import init_params
from optjax.sharding import RULES, initialize, make_mesh
from optjax.sharding.rules import DEFAULT_RULES

from .checkpoint import Checkpoints, remember_run
from .data import TextBatches, TextLoader, open_text, text_batches
from .log import Log
from .loss import evaluate
from .optimizer import Recipe
from .options import COMPUTE_DTYPES, DTYPES, MEMORIES, PLAIN, REMAT, StepOptions
from .placing import place_batch, rows
from .state import TrainState, abstract_state, check_batch, compile_step, init_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A run, apart from its model and its recipe. Steps count from the start of the run, over all resumes.

    Without a mesh (`optjax.sharding.parse_mesh`) it takes one device.
    """

    batch_size: int
    seed: int = 0
    stacked: bool = False
    mesh: str | None = None
    rules: str | None = None
    step: StepOptions = PLAIN
    init_scheme: str = "paper"
    stop_at: int | None = None
    save_every: int = 200
    eval_every: int = 200
    eval_batches: int = 16
    log_every: int = 10


def pretrain(
    config: OPTConfig,
    recipe: Recipe,
    options: Options,
    text: TextLoader,
    folder: str | Path,
    validation: TextBatches | None = None,
    quiet: bool = False,
) -> TrainState:
    """Trains until `recipe.total_steps` (or `options.stop_at`), from the newest checkpoint in `folder` if it has one.

    SIGTERM and SIGINT end it early, with a checkpoint.

    Raises:
      ValueError: the folder holds another run, records are longer than the model's positions, or something does not
        divide over the mesh.
    """
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    spread: dict[str, Any] = {"stacked": options.stacked, "mesh": mesh, "rules": options.rules}
    target = abstract_state(config, options.step, **spread)
    check_batch(target.params, options.batch_size, text.length, options.step)
    text.rows = rows(target.params, options.batch_size)
    about = {"config": config.to_dict(), "seed": options.seed, "stacked": options.stacked, "init": options.init_scheme}
    remember_run(folder, about)
    last = recipe.total_steps if options.stop_at is None else min(options.stop_at, recipe.total_steps)
    with Checkpoints(folder) as checkpoints:
        if checkpoints.latest is None:
            key = jax.random.key(options.seed)
            state = init_state(init_params(config, key, scheme=options.init_scheme, **spread), options.step)
        else:
            state = checkpoints.restore(target)
        first = int(state.step)
        text.set_state(text.get_state() | {"drawn": first * options.batch_size})
        with Log(folder, first, last, quiet) as log, _Interrupt() as interrupt:
            waiting: list[dict] = []
            update = None
            since, tokens = time.perf_counter(), 0
            for step in range(first, last):
                batch = place_batch(next(text), state.params, options.batch_size)
                if update is None:
                    update = compile_step(state, batch, recipe, options.seed, options.step)
                state, metrics = update(state, batch)
                waiting.append(metrics)
                tokens += options.batch_size * text.length
                done = step + 1
                logs = done == last or done % options.log_every == 0
                stops = interrupt.received(agree=logs)  # asked once: a signal may come at any line below
                ends = done == last or stops
                if ends or logs:
                    entry = _summary(jax.device_get(waiting)) | {"tokens_per_second": 0.0}
                    entry["tokens_per_second"] = tokens / (time.perf_counter() - since)
                    if validation is not None and (done == last or done % options.eval_every == 0):
                        batches = dataclasses.replace(validation, rows=rows(state.params, validation.batch_size))
                        found = evaluate(
                            state.params,
                            batches,
                            options.step,
                            batch_size=validation.batch_size,
                            bytes_per_token=validation.bytes_per_token,
                        )
                        entry |= {f"validation_{name}": value for name, value in found.items()}
                    log.write({"step": done, "length": text.length, "batch_size": options.batch_size} | entry)
                    waiting, since, tokens = [], time.perf_counter(), 0
                if ends or done % options.save_every == 0:
                    checkpoints.save(state)
                if stops:
                    log.say(f"stopped after step {done}; the same command goes on from there")
                    break
    return state


def _summary(metrics: list[dict]) -> dict[str, float]:
    """Mean loss and gradient norm, and the last learning rate, of the steps since the last entry."""
    return {
        "loss": float(np.mean([m["loss"] for m in metrics])),
        "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
        "lr": float(metrics[-1]["lr"]),
    }


class _Interrupt:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT is a KeyboardInterrupt as usual."""

    _signalled = False

    def received(self, agree: bool) -> bool:
        """Whether one came. Where there are several processes they stop together, at a step where all `agree`."""
        if jax.process_count() == 1:
            return self._signalled
        return agree and bool(multihost_utils.process_allgather(np.array(self._signalled)).any())

    def __enter__(self) -> _Interrupt:
        try:
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: signals are somebody else's business
            self._before = {}
        return self

    def _note(self, number: int, _frame: object) -> None:
        self._signalled = True
        which = signal.Signals(number)
        if which in self._before:
            signal.signal(which, self._before[which])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what is trained, on what")
    group.add_argument("--config", required=True, metavar="FILE", help="config.json, or a preset such as opt-125m")
    group.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="text of optjax.train.pack")
    group.add_argument("--validation", type=Path, metavar="FOLDER", help="another, measured every --eval-every steps")
    group.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="checkpoints and log.jsonl go here")
    group.add_argument("--seed", type=int, default=0, help="of the weights, the order of the data, and dropout (0)")
    group.add_argument("--init", choices=["hf", "paper"], default="paper", help="initialization scheme (paper)")
    group.add_argument(
        "--stacked", action="store_true", help="scan over stacked layers: compiles faster, for deep models"
    )

    group = parser.add_argument_group("over which devices, and how (all of it may change on resume)")
    group.add_argument("--mesh", metavar="SPEC", help="such as fsdp=32,tensor=8; -1 is the rest (one device)")
    group.add_argument(
        "--rules", choices=list(RULES), help=f"what is split over which axis of the mesh ({DEFAULT_RULES})"
    )
    group.add_argument(
        "--dtype", choices=COMPUTE_DTYPES, default="float32", help="to compute in; weights stay float32 (float32)"
    )
    group.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, taken one after another (1)")
    group.add_argument(
        "--remat",
        choices=REMAT,
        default="none",
        help="kept of each layer for the backward pass: none is recomputed, matrix products are kept (dots), the input "
        "is (full), or is in the host's memory (offload) (none)",
    )
    group.add_argument("--query-block", type=int, help="queries attended at a time; 0: all (512 of 1024 and more)")
    group.add_argument(
        "--attn-implementation",
        choices=IMPLEMENTATIONS,
        default="eager",
        help="kernels of TPU and GPU (flash), or none; auto: flash where it can be had (eager)",
    )
    group.add_argument("--loss-chunks", type=int, help="parts of a row whose logits exist together (by their size)")
    group.add_argument("--moments-dtype", choices=DTYPES, default="float32", help="of AdamW's state (float32)")
    group.add_argument("--moments-memory", choices=MEMORIES, default="device", help="where AdamW's state is (device)")

    group = parser.add_argument_group("how long")
    group.add_argument("--steps", type=int, required=True, help="steps in all; the learning rate ends its fall there")
    group.add_argument("--stop-at", type=int, metavar="STEP", help="stop early, with the schedule unchanged")
    group.add_argument("--batch-size", type=int, default=16, help="records per step (16)")
    group.add_argument("--length", type=int, help="tokens per record (max_position_embeddings); may change on resume")

    group = parser.add_argument_group("recipe (AdamW, as of the OPT paper; all of it may change on resume)")
    group.add_argument("--lr", type=float, default=6e-4, help="peak learning rate (6e-4)")
    group.add_argument("--warmup", type=int, default=2000, metavar="STEPS", help="linear warm-up (2000)")
    group.add_argument("--decay-from", type=int, metavar="STEP", help="keep the peak until this step (end of warm-up)")
    group.add_argument("--final-fraction", type=float, default=0.1, help="of the peak, at the last step (0.1)")
    group.add_argument("--weight-decay", type=float, default=0.1, help="not on biases and norms (0.1)")
    group.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), metavar=("B1", "B2"), help="(0.9 0.95)")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (1.0)")

    group = parser.add_argument_group("log and checkpoints")
    group.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="(10)")
    group.add_argument("--eval-every", type=int, default=200, metavar="STEPS", help="a multiple of --log-every (200)")
    group.add_argument("--eval-batches", type=int, default=16, help="of --validation, from its beginning (16)")
    group.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="the last two stay (200)")
    group.add_argument("--export", type=Path, metavar="FOLDER", help="at the end, write a Hugging Face checkpoint here")
    group.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer files that --export copies along")
    group.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        initialize()
        is_file = Path(args.config).exists()
        config = OPTConfig.from_json(args.config) if is_file else OPTConfig.preset(args.config)
        recipe = Recipe(
            peak_lr=args.lr,
            total_steps=args.steps,
            warmup_steps=args.warmup,
            decay_from=args.decay_from,
            final_fraction=args.final_fraction,
            beta1=args.betas[0],
            beta2=args.betas[1],
            weight_decay=args.weight_decay,
            clip_norm=args.clip,
        )
        options = Options(
            batch_size=args.batch_size,
            seed=args.seed,
            stacked=args.stacked,
            mesh=args.mesh,
            rules=args.rules,
            step=StepOptions(
                dtype=args.dtype,
                micro_batches=args.micro_batches,
                remat=args.remat,
                query_block=args.query_block,
                attn_implementation=args.attn_implementation,
                loss_chunks=args.loss_chunks,
                moments_dtype=args.moments_dtype,
                moments_memory=args.moments_memory,
            ),
            init_scheme=args.init,
            stop_at=args.stop_at,
            save_every=args.save_every,
            eval_every=args.eval_every,
            eval_batches=args.eval_batches,
            log_every=args.log_every,
        )
        length = args.length or config.max_position_embeddings
        vocab_size, batch_size = config.vocab_size, args.batch_size
        text = open_text(args.data, length=length, batch_size=batch_size, seed=args.seed, vocab_size=vocab_size)
        size = max(1, batch_size // args.micro_batches)
        validation = args.validation and text_batches(
            args.validation, length, size, args.eval_batches, vocab_size=vocab_size
        )
        state = pretrain(config, recipe, options, text, args.run, validation, args.quiet)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if args.export and int(state.step) == recipe.total_steps:
        from .export import export

        export(state.params, args.export, tokenizer=args.tokenizer)
        print(f"wrote {args.export}", file=sys.stderr)


if __name__ == "__main__":
    main()
