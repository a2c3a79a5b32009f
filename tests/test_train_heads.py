"""Train steps of classifiers and of question answering, and what a step does with numbers that are not finite."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax
from optjax import OPTConfig, init_params
from optjax.sharding import make_mesh
from optjax.train.backward import loss_and_gradients
from optjax.train.loss import evaluate
from optjax.train.optimizer import Recipe
from optjax.train.options import StepOptions
from optjax.train.placing import place_batch, rows
from optjax.train.state import abstract_state, init_state, train_step

CONFIG = OPTConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=24,
    max_position_embeddings=12,
    dropout=0.0,
    init_std=0.3,
    num_labels=4,
)
B, T = 8, 12
RECIPE = Recipe(peak_lr=1e-2, total_steps=8, warmup_steps=2)
rng = np.random.default_rng(0)
IDS = rng.integers(3, CONFIG.vocab_size, (B, T)).astype(np.int32)
# Padding on the left, on the right, and in the middle.
MASK = np.ones((B, T), np.int32)
MASK[1, :4] = MASK[2, 7:] = MASK[3, 5] = MASK[3, 10:] = 0
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
SPAN = {
    "start_positions": rng.integers(0, T, B).astype(np.int32),
    "end_positions": np.array([0, 3, 99, 5, 6, -1, 4, 99], np.int32),
}
HEADS = {
    "single label": ("sequence_classification", {}, {"labels": np.array([0, 3, -100, 1, 2, 2, -100, -100], np.int32)}),
    "multi-label": ("sequence_classification", {}, {"labels": rng.integers(0, 2, (B, 4)).astype(np.float32)}),
    "regression": ("sequence_classification", {"num_labels": 1}, {"labels": rng.normal(size=B).astype(np.float32)}),
    # A token that sees none, padding before the first, is in the softmax over tokens, and what it gets means nothing.
    "span": ("question_answering", {}, SPAN | {"attention_mask": np.maximum(MASK, np.arange(T) == 0)}),
    "language model": ("causal_lm", {}, {"labels": np.where(MASK == 1, np.roll(IDS, -1, 1), -100)}),
}
LEVERS = StepOptions(micro_batches=2, remat="full", query_block=4)


def of_the_model(params, batch):
    """The loss by optjax's own functions, of the whole batch."""
    batch = dict(batch)
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    if params.head == "causal_lm":
        logits = optjax.causal_lm(params, ids, attention_mask=mask).logits
        kept = batch["labels"] != -100
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, batch["labels"], 0))
        return jnp.where(kept, losses, 0).sum() / kept.sum()
    return getattr(optjax, params.head)(params, ids, attention_mask=mask, **batch).loss


@pytest.mark.parametrize("name, stacked", [*((name, True) for name in HEADS), ("single label", False)])
def test_losses_and_gradients_of_heads(name, stacked):
    """Over eight devices, of layers that are stacked; on one, of those in a list."""
    head, changes, labels = HEADS[name]
    config, batch = CONFIG.replace(num_hidden_layers=1 + (not stacked), **changes), TOKENS | labels
    made = init_params(config, jax.random.key(0), head=head, stacked=stacked)
    expected, theirs = jax.jit(jax.value_and_grad(of_the_model))(made, batch)
    mesh = make_mesh("fsdp=4,tensor=2", jax.devices()[:8])
    spread: dict = {"mesh": mesh, "rules": "fsdp+tensor"} if stacked else {}
    params = init_params(config, jax.random.key(0), head=head, stacked=stacked, **spread)
    found, ours = jax.jit(loss_and_gradients, static_argnums=3)(params, place_batch(batch, params, B), None, LEVERS)
    np.testing.assert_allclose(float(found), float(expected), rtol=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(other).max()), 1e-2 * largest)
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
    assert evaluate(params, [batch], LEVERS)["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_labels_of_8_bits():
    """In which neither -100, nor the length of a row, nor the size of the vocabulary is a number."""
    config = CONFIG.replace(vocab_size=300, max_position_embeddings=260, num_labels=200)
    ids = rng.integers(3, 200, (2, 260))
    for head, labels in {
        "causal_lm": {"labels": np.where(ids == 9, 156, ids)},
        "sequence_classification": {"labels": np.array([156, 3])},
        "question_answering": {"start_positions": np.array([50, 7]), "end_positions": np.array([200, 9])},
    }.items():
        params = init_params(config, jax.random.key(0), head=head)
        batches = ({"input_ids": ids} | {name: x.astype(dtype) for name, x in labels.items()} for dtype in "iB")
        (loss, gradients), narrow = (
            jax.jit(loss_and_gradients, static_argnums=3)(params, batch, None, StepOptions()) for batch in batches
        )
        assert narrow[0] == loss
        jax.tree.map(np.testing.assert_array_equal, narrow[1], gradients)


@pytest.mark.parametrize("name", HEADS)
def test_a_step_where_jax_promotes_no_dtype(name):
    """Every cast is explicit."""
    head, changes, labels = HEADS[name]
    options = dataclasses.replace(LEVERS, dtype="bfloat16", moments_dtype="bfloat16")
    with jax.numpy_dtype_promotion("strict"):
        state = init_state(init_params(CONFIG.replace(**changes), jax.random.key(0), head=head, stacked=True), options)
        after, _ = jax.eval_shape(lambda state: train_step(state, TOKENS | labels, RECIPE, 0, options), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_classifier_learns():
    head, _, labels = HEADS["single label"]
    state = init_state(init_params(CONFIG, jax.random.key(0), head=head, stacked=True), LEVERS)
    assert jax.tree.structure(state) == jax.tree.structure(abstract_state(CONFIG, LEVERS, head=head, stacked=True))
    losses = []
    for _ in range(8):
        state, metrics = train_step(state, TOKENS | labels, RECIPE, 0, LEVERS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "head, change, message",
    [
        ("causal_lm", {"labels": None}, "should hold input_ids, labels.* this one holds"),
        ("causal_lm", {"label": IDS}, "this one holds .*label"),
        ("causal_lm", {"labels": IDS[:, 1:]}, r"labels should have shape \(8, 12\), got \(8, 11\)"),
        ("causal_lm", {"segment_ids": MASK}, "not both"),
        (
            "sequence_classification",
            {"labels": IDS},
            r"labels for single_label.* have shape \(8,\)",
        ),
        ("question_answering", {}, "should hold input_ids, start_positions, end_positions"),
        ("question_answering", {"labels": None} | SPAN | {"end_positions": np.ones(B)}, "end_positions.* integers"),
        (None, {}, "head None"),
    ],
)
def test_a_batch_that_does_not_fit_the_head(head, change, message):
    batch = {name: array for name, array in (TOKENS | {"labels": IDS} | change).items() if array is not None}
    state = init_state(init_params(CONFIG, jax.random.key(0), head=head))
    with pytest.raises(ValueError, match=message):
        train_step(state, batch, RECIPE)


def test_rows_of_another_number_are_refused():
    params = init_params(CONFIG, jax.random.key(0))
    assert rows(params, 6) == range(6)
    with pytest.raises(ValueError, match="input_ids has 8 rows.* a batch of 6 is rows 0 to 5"):
        place_batch(TOKENS, params, 6)


@pytest.mark.parametrize("bad, memory", [("loss", "host"), ("gradient", "device")])
def test_what_is_not_finite_changes_no_bit_and_is_counted(bad, memory):
    """A weight that overflows the loss; a loss scale with which float16's gradients alone do."""
    dtype = "float16" if bad == "gradient" else "float32"
    options = StepOptions(moments_memory=memory, moments_dtype="bfloat16", dtype=dtype)
    params = init_params(CONFIG, jax.random.key(0), stacked=True)
    if bad == "loss":
        params["final_layer_norm"]["weight"] = params["final_layer_norm"]["weight"].at[0].set(jnp.nan)
    before = init_state(params, options)
    moments = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 0.5, x.dtype), x.sharding), before.moments)
    guard = dataclasses.replace(before.guard, loss_scale=jnp.float32(2.0**100))
    before = dataclasses.replace(before, moments=moments, guard=guard)
    after, metrics = train_step(jax.tree.map(jnp.copy, before), TOKENS | HEADS["language model"][2], RECIPE, 0, options)
    assert np.isfinite(float(metrics["loss"])) == (bad == "gradient")
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert int(metrics["skipped"]) == int(after.guard.skipped) == int(after.step) == 1
    assert float(after.guard.loss_scale) == (2.0**99 if bad == "gradient" else 0.0)
    for name in ("params", "moments"):
        for one, other in zip(*(jax.tree.leaves(getattr(each, name)) for each in (before, after)), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_the_learning_rate_follows_the_guard():
    head, _, labels = HEADS["language model"]
    state = init_state(init_params(CONFIG, jax.random.key(0)))
    halved = dataclasses.replace(state, guard=dataclasses.replace(state.guard, lr_scale=jnp.float32(0.5)))
    moved = []
    for each in (state, halved):
        before = np.asarray(each.params["embed_tokens"]["weight"])
        after, metrics = train_step(jax.tree.map(jnp.copy, each), TOKENS | labels, RECIPE)
        moved.append((float(metrics["lr"]), np.asarray(after.params["embed_tokens"]["weight"]) - before))
    assert moved[0][0] == 2 * moved[1][0]
    np.testing.assert_allclose(moved[0][1], 2 * moved[1][1], rtol=0, atol=2e-7)
