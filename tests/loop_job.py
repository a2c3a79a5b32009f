"""A small job for the training loop, which has nothing of OPT: a linear model whose steps draw noise, and a loader that
can plant trouble. As a program, what the tests of kills run: `python loop_job.py FOLDER '{"total_steps": 8}' '{}'`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from optjax.train.divergence import Spikes
from optjax.train.job import Job, LoopOptions
from optjax.train.loop import run

B, D = 16, 24


@partial(jax.tree_util.register_dataclass, data_fields=["lr_scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Guard:
    lr_scale: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["weights", "momentum", "step", "guard"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    weights: jax.Array
    momentum: jax.Array
    step: jax.Array
    guard: Guard


class Batches:
    """Batch n is a function of n; this process's rows of it. `plant` maps the number of a batch to a factor."""

    def __init__(self, plant: dict[int, float], rows: range, slow: float = 0.0):
        self.plant, self.rows, self.slow, self.place, self.closed = plant, rows, slow, 0, False

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.slow)
        x = np.random.default_rng([7, self.place]).normal(size=(B, D)).astype(np.float32)
        x *= self.plant.get(self.place, 1.0)
        self.place += 1
        return x[self.rows.start : self.rows.stop]

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]

    def close(self):
        self.closed = True


@partial(jax.jit, donate_argnums=0)
def step(state: State, x: jax.Array):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step), x.shape)
    truth = jnp.arange(D, dtype=jnp.float32) / D

    def loss_of(weights):
        return jnp.mean(((x + 0.01 * noise) @ (weights - truth[:, None])) ** 2) + 1.0

    loss, gradient = jax.value_and_grad(loss_of)(state.weights)
    norm = jnp.sqrt(jnp.sum(gradient**2))
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)
    momentum = 0.9 * state.momentum + gradient / jnp.maximum(norm, 1.0)
    lr = 0.02 * state.guard.lr_scale
    new = State(
        jnp.where(fine, state.weights - lr * momentum, state.weights),
        jnp.where(fine, momentum, state.momentum),
        state.step + 1,
        state.guard,
    )
    return new, {"loss": loss, "grad_norm": norm, "lr": lr, "skipped": (~fine).astype(jnp.int32)}


def make_job(plant: dict[int, float] | None = None, slow: float = 0.0, width: int = 8, **more) -> Job:
    """Weights split over all devices, and so the rows of a batch; on one device where there are no more."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("x",), ()))

    def like(shape, sharding, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    target = State(like((D, width), split), like((D, width), split), like((), whole, jnp.int32), Guard(like((), whole)))

    def init():
        weights = 1.0 + 1e-3 * jax.random.normal(jax.random.key(2), (D, width))  # files of ones would be very small
        values = State(weights, jnp.zeros((D, width)), jnp.zeros((), jnp.int32), Guard(jnp.ones(())))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        return jax.jit(lambda tree: tree, out_shardings=shardings)(values)

    share = B // jax.process_count()
    rows = range(share * jax.process_index(), share * (jax.process_index() + 1))

    def take(state, x):
        batch = jax.make_array_from_process_local_data(split, x, (B, D))
        return step(state, batch)

    loader = Batches(plant or {}, rows, slow)
    about = {"toy": 1}
    return Job(
        target=target, init=init, step=take, loader=loader, about=about, tokens_per_step=B, flops_per_step=1e6, **more
    )


SPIKES = Spikes(window=16, least=4, patience=2, max_skipped=3, margin=1, memory=100)


def options(**changes) -> LoopOptions:
    given = {"total_steps": 12, "save_every": 4, "log_every": 2, "eval_every": 6, "quiet": True, "spikes": SPIKES}
    return LoopOptions(**(given | {"tensorboard": False, "report": False} | changes))


def main() -> None:
    """Runs the job in FOLDER, with options and arguments of `make_job`, and a `death`: of `process`, by `signal`, once
    its `step`-th step is handed to the device, or as soon as a file `exists` (a pattern, in the folder)."""
    from optjax.sharding import initialize
    from optjax.train import checkpoint, run_file

    initialize()
    multihost_utils.reached_preemption_sync_point = _in_turn(multihost_utils.reached_preemption_sync_point)
    folder, changes, more = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    death = more.pop("death", None)
    checkpoint.PATIENCE = more.pop("patience", checkpoint.PATIENCE)
    more |= {"evaluate": lambda state: {"mean": float(jnp.mean(state.weights))}, "better": ("mean", "min")}
    job = make_job({int(n): factor for n, factor in more.pop("plant", {}).items()}, **more)
    if death is not None and death.get("process", 0) == jax.process_index():
        die = partial(os.kill, os.getpid(), death["signal"])
        if "step" in death:
            job = dataclasses.replace(job, step=_after(job.step, death["step"], die))
        else:
            threading.Thread(target=_once, args=(Path(folder), death["exists"], die), daemon=True).start()
    run_file.remember_run(folder, job.about)  # as a script does that writes settings before the loop begins
    given = options(**changes)
    state = run(job, folder, given)
    whole = jax.jit(lambda tree: tree, out_shardings=state.step.sharding)(state)
    if jax.process_index() == 0 and int(state.step) == given.total_steps:
        np.savez(Path(folder) / "final.npz", *map(np.asarray, jax.tree.leaves(whole)))


def _in_turn(reached):
    """Only one may count for jax's preemption service: a stop is announced for a count, and two never meet."""
    counts = itertools.count(1)

    def asked(count):
        assert count == next(counts), count
        return reached(count)

    return asked


def _after(function, step, die):
    """Dies with the `step`-th step, and if it lives on, as long as others take to hear of it, goes slowly: they hear
    after a second or two, on a busy machine later, and have to hear before the run is over."""
    handed = []

    def wrapped(state, batch):
        out = function(state, batch)
        handed.append(None)
        if len(handed) == step:
            die()
        if len(handed) >= step:
            time.sleep(2.0 if jax.process_count() > 1 else 0.0)
        return out

    return wrapped


def _once(folder: Path, pattern: str, die) -> None:
    while not any(folder.glob(pattern)):
        time.sleep(0.0005)
    die()


if __name__ == "__main__":
    main()
