"""What the training loop costs: steps of a run beside the same compiled step called again and again.

    python -m bench.train_loop [--layers 4 --hidden 256 --length 128 --batch 8] [--rounds 9]

Rounds in turn, in one process: so many steps through `optjax.train.loop.run`, with batches from a loader, a log with
TensorBoard events, the watch for divergence and no checkpoint inside the measured steps; and as many calls of the
compiled step on a batch that is on the device already. The figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import Parser


def main() -> None:
    parser = Parser("train_loop", __doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax
    import numpy as np

    from optjax import OPTConfig, init_params
    from optjax.train.data import open_text, write_tokens
    from optjax.train.job import Job, LoopOptions
    from optjax.train.loop import run
    from optjax.train.optimizer import Recipe
    from optjax.train.placing import place_batch
    from optjax.train.state import abstract_state, compile_step, init_state
    from optjax.train.stepping import model_flops, step_function

    config = OPTConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        ffn_dim=4 * args.hidden,
        num_attention_heads=max(1, args.hidden // 64),
        max_position_embeddings=args.length,
    )
    total = args.steps * (args.rounds + 1) + 1  # the last round is over where another step begins
    recipe = Recipe(peak_lr=1e-4, total_steps=total, warmup_steps=1)

    def init(seed: int = 0):
        return init_state(init_params(config, jax.random.key(seed)))

    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(4, args.vocabulary, 200 * args.batch * args.length)
        write_tokens(Path(folder) / "text", tokens, vocab_size=args.vocabulary, bytes=len(tokens))
        loader = open_text(
            Path(folder) / "text", length=args.length, batch_size=args.batch, seed=0, vocab_size=args.vocabulary
        )
        bare_state: Any = init(1)
        batch = place_batch(next(loader), bare_state.params, args.batch)
        bare = compile_step(bare_state, batch, recipe)
        inner = step_function(lambda *_: bare, bare_state.params, args.batch)
        in_loop, alone, calls, mark = [], [], 0, 0.0

        def step(state, host_batch):
            """A step of the loop; before every so many of them, the clock is read and the bare step has its turn."""
            nonlocal calls, mark, bare_state
            if calls % args.steps == 0 and calls:
                jax.block_until_ready(state)
                if calls > args.steps:  # the first round compiles
                    in_loop.append(time.perf_counter() - mark)
                start = time.perf_counter()
                for _ in range(args.steps):
                    bare_state, _ = bare(bare_state, batch)
                jax.block_until_ready(bare_state)
                if calls > args.steps:
                    alone.append(time.perf_counter() - start)
                mark = time.perf_counter()
            calls += 1
            return inner(state, host_batch)

        job = Job(
            target=abstract_state(config),
            init=init,
            step=step,
            loader=loader,
            about={},
            tokens_per_step=args.batch * args.length,
            flops_per_step=model_flops(config, args.batch, args.length),
        )
        options = LoopOptions(total_steps=total, save_every=10 * total, eval_every=10 * total, quiet=True)
        run(job, Path(folder) / "run", options)
    ratios = [loop / bare for loop, bare in zip(in_loop, alone, strict=True)]
    ms = [1e3 * median(times) / args.steps for times in (alone, in_loop)]
    print(f"a step alone {ms[0]:.1f} ms, in the loop {ms[1]:.1f} ms; medians of {len(ratios)} rounds of {args.steps}")
    print(f"in the loop / alone: {median(ratios):.3f} (of the rounds {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
