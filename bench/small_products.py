"""How fast XLA's CPU backend reads a weight in products with a few rows, in the two orders of `optjax.layer.linear`.

    python -m bench.small_products [--dtype bfloat16] [--cores 2]

Both orders run in turn, on enough weights that no cache holds them; the figure is GB/s of weights read, the best of all
rounds. The last column is the ratio by which ``(W xᵀ)ᵀ`` is faster than ``x Wᵀ``.
"""

from __future__ import annotations

import os
import time

from bench.arguments import Parser

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))


def main() -> None:
    parser = Parser("small_products", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=250, help="of weights in each program")
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    import jax
    import jax.numpy as jnp

    def chain(order):
        """All weights, one after the other as in a model: each product waits for the one before."""

        def run(x, weights):
            outs = []
            for w in weights:
                outs.append(order(x, w))
                x = x + outs[-1].ravel()[0] * 1e-9
            return outs

        return jax.jit(run)

    orders = {
        "x Wᵀ": chain(lambda x, w: jnp.einsum("ri,oi->ro", x, w)),
        "W xᵀ": chain(lambda x, w: jnp.einsum("oi,ri->or", w, x)),
    }
    print(f"{'out':>6} {'in':>6} {'rows':>5}" + "".join(f"{name:>10}" for name in orders) + f"{'ratio':>8}")
    for n_out, n_in in SHAPES:
        size = n_out * n_in * jnp.dtype(args.dtype).itemsize
        count = max(1, args.megabytes * 10**6 // size)
        weights = [jnp.full((n_out, n_in), i, args.dtype) for i in range(count)]
        for rows in args.rows:
            x = jnp.ones((rows, n_in), args.dtype)
            best = dict.fromkeys(orders, float("inf"))
            for round in range(args.rounds + 1):
                for name, run in orders.items():
                    start = time.perf_counter()
                    jax.block_until_ready(run(x, weights))
                    if round:  # the first compiles
                        best[name] = min(best[name], time.perf_counter() - start)
            speeds = [count * size / seconds / 1e9 for seconds in best.values()]
            print(f"{n_out:>6} {n_in:>6} {rows:>5}" + "".join(f"{s:>10.1f}" for s in speeds), end="")
            print(f"{speeds[1] / speeds[0]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
