"""Computing in float16: the loss scale against torch's GradScaler, and steps against those of float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from optjax import OPTConfig, init_params
from optjax.train.backward import loss_and_gradients
from optjax.train.guard import after_step, init_guard
from optjax.train.optimizer import Recipe
from optjax.train.options import StepOptions
from optjax.train.state import init_state, train_step

CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=16,
    dropout=0.1,
    init_std=0.2,
    activation_function="gelu",  # at relu's corner a rounding error turns a gradient on or off
)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (8, 17)).astype(np.int32)
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
HALF = StepOptions(dtype="float16", micro_batches=2, remat="full", loss_scale_window=3)


def test_the_scale_goes_up_and_down_as_torchs():
    """After three good updates in a row it doubles, after a bad one it halves, and the count begins again."""
    options = dataclasses.replace(HALF, loss_scale_init=2.0**10)
    weight = torch.nn.Parameter(torch.ones(1))
    adamw = torch.optim.AdamW([weight])
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)  # pyright: ignore
    guard, scales = init_guard(options), set()
    for good in np.random.default_rng(2).random(40) < 0.8:
        theirs.scale(weight.sum()).backward()
        assert weight.grad is not None
        weight.grad *= 1.0 if good else float("inf")
        theirs.step(adamw)
        theirs.update()
        adamw.zero_grad()
        guard = after_step(guard, jnp.bool_(good), options)
        assert float(guard.loss_scale) == theirs.get_scale()
        scales.add(theirs.get_scale())
    assert int(guard.skipped) > 3 and len(scales) > 3


@pytest.mark.parametrize("scale, good, expected", [(0.5, False, 0.25), (0.25, False, 0.25), (2.0**127, True, 2.0**127)])
def test_the_scale_stays_within_bounds(scale, good, expected):
    guard = dataclasses.replace(init_guard(HALF), loss_scale=jnp.float32(scale), good_steps=jnp.int32(2))
    assert float(after_step(guard, jnp.bool_(good), HALF).loss_scale) == expected


def test_small_gradients_do_not_vanish():
    """Scaled, float16's gradients are those of float32 to a few digits; so small that they vanish, they are not."""
    params = init_params(CONFIG, jax.random.key(0), stacked=True)
    key = jax.random.key(1)
    exact = loss_and_gradients(params, BATCH, key, dataclasses.replace(HALF, dtype="float32"))
    errors = []
    for scale in (2.0**12, 2.0**-12):
        loss, gradients = jax.jit(loss_and_gradients, static_argnums=3)(params, BATCH, key, HALF, scale)
        assert float(loss) == pytest.approx(float(exact[0]), rel=2e-3)
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(exact[1]), strict=True)
        squares = np.array([(np.square(a / scale - b).sum(), np.square(b).sum()) for a, b in pairs])
        errors.append(np.sqrt(squares[:, 0].sum() / squares[:, 1].sum()))
    assert errors[0] < 5e-3 and errors[1] > 0.1, errors


def test_steps_are_near_those_of_float32():
    """From a scale so high that the first updates are left out: what follows is float32's run from its first step."""
    recipe = Recipe(peak_lr=5e-3, total_steps=100, warmup_steps=0, final_fraction=1.0)
    curves, scales, skipped = {}, [], []
    for dtype, steps in (("float16", 20), ("float32", 20)):
        options = dataclasses.replace(HALF, dtype=dtype, loss_scale_init=2.0**24)
        state = init_state(init_params(CONFIG.replace(dropout=0.0), jax.random.key(0), stacked=True), options)
        curves[dtype] = []
        for _ in range(steps):
            state, metrics = train_step(state, BATCH, recipe, 0, options)
            curves[dtype].append(float(metrics["loss"]))
            if dtype == "float16":
                scales.append(float(metrics["loss_scale"]))
                skipped.append(int(metrics["skipped"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        assert float(metrics["loss_scale"]) == (1.0 if dtype == "float32" else scales[-1])
    first = skipped.index(0)
    assert first > 0 and scales[first] == 2.0 ** (24 - first), (scales, skipped)
    assert 0 in skipped and any(after > before for before, after in zip(scales, scales[1:], strict=False)), scales
    kept = [loss for loss, left_out in zip(curves["float16"], skipped, strict=True) if not left_out]
    np.testing.assert_allclose(kept, curves["float32"][: len(kept)], rtol=1e-2)
    assert kept[-1] < 0.8 * kept[0]


def test_a_run_may_go_on_in_another_dtype():
    """Into float16 it looks for a scale from the first one on; out of it, nothing is left of the scale."""
    recipe = Recipe(peak_lr=5e-3, total_steps=100, warmup_steps=0)
    scales = {"float16": 2.0**12, "float32": 1.0}
    state = init_state(init_params(CONFIG, jax.random.key(0), stacked=True))
    for dtype in ("float32", "float16", "float16", "bfloat16", "float32", "float16"):
        options = dataclasses.replace(HALF, dtype=dtype, loss_scale_init=2.0**12)
        state, metrics = train_step(state, BATCH, recipe, 0, options)
        assert float(metrics["loss_scale"]) == scales.get(dtype, 1.0) and not int(metrics["skipped"])
        assert int(state.guard.good_steps) == 0 or dtype == "float16"
