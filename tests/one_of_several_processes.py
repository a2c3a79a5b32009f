"""What each process of tests/test_sharding_processes.py runs: `checkpoint` and `out` are folders.

With two processes the run is split; with one it has all devices. Both write the same files.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optjax
from optjax.checkpoints import tensors
from optjax.sharding import initialize, make_mesh
from optjax.train.checkpoint import Checkpoints
from optjax.train.optimizer import Recipe
from optjax.train.options import StepOptions
from optjax.train.placing import place_batch, rows
from optjax.train.state import abstract_state, init_state, train_step

initialize()
checkpoint, out = map(Path, sys.argv[1:])
assert jax.device_count() == 8

read = 0
fill = tensors._fill


def counted(array, file, path):
    global read
    read += array.nbytes
    fill(array, file, path)


tensors._fill = counted
tensors.BAND = 1  # tiny weights are read row by row
mesh = make_mesh("fsdp=4,tensor=2")
params = optjax.load_params(checkpoint, mesh=mesh, stacked=True)
np.save(out / f"read-{jax.process_index()}.npy", read)

rng = np.random.default_rng(0)
ids = rng.integers(3, 60, size=(8, 9)).astype(np.int32)
made = optjax.generate(optjax.unstack_layers(params), ids[:, :5], max_new_tokens=4, eos_token_id=[])
everywhere = jax.NamedSharding(mesh, jax.P())
logits = jax.jit(lambda p, x: optjax.causal_lm(p, x).logits, out_shardings=everywhere)(params, ids)

optjax.save_params(params, out / "saved")


def train(params, recipe, steps, **options):
    """The state after so many steps, each over the rows in another order, and their losses."""
    state, losses = init_state(jax.tree.map(jnp.copy, params)), []
    for step in range(steps):
        own = np.roll(ids, step, axis=0)[rows(params, len(ids))]
        assert len(own) == 8 // jax.process_count()
        batch = place_batch({"input_ids": own[:, :-1], "labels": own[:, 1:]}, params, len(ids))
        state, metrics = train_step(state, batch, recipe, **options)
        losses.append(np.asarray(metrics["loss"]))
    return state, np.stack(losses)


state, losses = train(params, Recipe(peak_lr=1e-2, total_steps=4, warmup_steps=0), 2)
dropping = dataclasses.replace(params, config=params.config.replace(dropout=0.1, attention_dropout=0.1))
halves = StepOptions(micro_batches=2)
_, curve = train(dropping, Recipe(peak_lr=1e-3, total_steps=40, warmup_steps=4), 40, seed=3, options=halves)
with Checkpoints(out / "run") as checkpoints:
    checkpoints.save(state)
with Checkpoints(out / "run") as checkpoints:
    restored = checkpoints.restore(abstract_state(params.config, stacked=True, mesh=mesh))
for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
    assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)

whole = jax.jit(lambda x: x, out_shardings=everywhere)(restored)
if jax.process_index() == 0:
    np.save(out / "ids.npy", made)
    np.save(out / "logits.npy", logits)
    np.save(out / "losses.npy", losses)
    np.save(out / "curve.npy", curve)
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(whole)}
    np.savez(out / "restored.npz", **named)
