"""Adapters trained: PEFT with torch's AdamW is the measure; over devices, over quantized weights, and what is kept."""

from __future__ import annotations

import copy
import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import torch
from hf_models import assert_close, params_from, state_of, torch_model
from jax.extend.core import jaxprs_in_params
from peft_models import TASKS, adapt, quietly

import optjax
from optjax import LoraConfig, OPTConfig
from optjax.sharding import make_mesh
from optjax.train.adapters import (
    abstract_adapter_state,
    adapter_step,
    init_adapter_state,
    loss_and_adapter_gradients,
)
from optjax.train.backward import loss_and_gradients
from optjax.train.loss import evaluate
from optjax.train.optimizer import Recipe
from optjax.train.options import PLAIN, StepOptions
from optjax.train.placing import place_batch

CONFIG = OPTConfig(
    vocab_size=47,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=24,
    max_position_embeddings=16,
    num_labels=3,
    dropout=0.0,
)
EVERY = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# The figure of 100 steps was seen once; this many are enough to see an error.
STEPS = int(os.environ.get("OPTJAX_LORA_STEPS", "30"))
RECIPE = Recipe(peak_lr=1e-2, total_steps=STEPS, warmup_steps=5, clip_norm=0.5)
B, T = 8, 12


def batches(head: str, steps: int = STEPS):
    for step in range(steps):
        rng = np.random.default_rng(step % 5)
        records = rng.integers(3, CONFIG.vocab_size, (B, T + 1)).astype(np.int32)
        if head == "causal_lm":
            yield {"input_ids": records[:, :-1], "labels": records[:, 1:]}
        else:
            mask = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(np.int32)
            ids = np.where(mask, records[:, :-1], CONFIG.pad_token_id)
            yield {"input_ids": ids, "attention_mask": mask, "labels": rng.integers(0, 3, B).astype(np.int32)}


def lr(step: int) -> float:
    warmup = (step + 1) / RECIPE.warmup_steps
    gone = max(0, step + 1 - RECIPE.warmup_steps) / (RECIPE.total_steps - RECIPE.warmup_steps)
    return RECIPE.peak_lr * min(warmup, 1 - 0.9 * gone)


def train_torch(model, head: str) -> list[float]:
    """PEFT's model, trained by torch's AdamW; the losses."""
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    betas = RECIPE.beta1, RECIPE.beta2
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=betas, eps=RECIPE.eps, weight_decay=RECIPE.weight_decay)
    losses = []
    for step, batch in enumerate(batches(head)):
        labels = torch.from_numpy(batch["labels"]).long()
        inputs = {name: torch.from_numpy(batch[name]).long() for name in batch if name != "labels"}
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, RECIPE.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("head", "stacked", "options"),
    [
        ("causal_lm", True, StepOptions(micro_batches=2, remat="full", loss_chunks=3)),
        ("sequence_classification", False, StepOptions()),
    ],
)
def test_steps_are_those_of_peft(head, stacked, options, tmp_path):
    model = torch_model(CONFIG, head)
    base = params_from(state_of(model), CONFIG, head, stacked=stacked)
    config = peft.LoraConfig(task_type=TASKS[head], r=4, target_modules=EVERY, rank_pattern={"fc1": 2}, use_rslora=True)
    torch.manual_seed(0)
    adapted = adapt(copy.deepcopy(model), config)
    quietly(adapted.save_pretrained, tmp_path / "before")
    state = init_adapter_state(optjax.place_adapters(optjax.load_adapters(tmp_path / "before"), base), options)
    before = jax.tree.map(np.array, base)
    losses = []
    for batch in batches(head):
        state, metrics = adapter_step(state, base, batch, RECIPE, 0, options)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, train_torch(adapted, head), rtol=1e-4)
    assert losses[-1] < losses[0]
    quietly(adapted.save_pretrained, tmp_path / "after")
    optjax.save_adapters(state.adapters, tmp_path / "ours")
    ours, theirs = (optjax.load_adapters(tmp_path / name) for name in ("ours", "after"))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(one, other, tolerance=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, base)


def random_state(base, options=PLAIN, key: int = 1, **fields):
    """A state whose adapters change the model from the start."""
    config = LoraConfig(**dict(r=3, target_modules=EVERY, init_lora_weights=False) | fields)
    return init_adapter_state(optjax.init_adapters(base, config, jax.random.key(key)), options)


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    """Of all that the equations of a program make, those of the programs inside them included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated", "scatter-add"):
            found |= {tuple(out.aval.shape) for out in equation.outvars}
        for inner in jaxprs_in_params(equation.params):
            found |= shapes_of(inner)
    return found


@pytest.mark.parametrize("stacked", [False, True])
def test_no_gradient_of_the_base_is_made(stacked):
    """No product and no sum has the shape of a base weight; by the base's own weights there are all of them."""
    config = CONFIG.replace(hidden_size=20, ffn_dim=28)
    base = optjax.init_params(config, jax.random.key(0), stacked=stacked)
    adapters = random_state(base).adapters
    batch = jax.tree.map(jnp.asarray, next(batches("causal_lm")))
    weights = {(20, 20), (28, 20), (20, 28), (config.vocab_size, 20)}

    def shapes(function, by):
        made = jax.make_jaxpr(function)(by)
        return {shape[-2:] for shape in shapes_of(made.jaxpr)} | {shape[-2:][::-1] for shape in shapes_of(made.jaxpr)}

    own = shapes(lambda each: loss_and_adapter_gradients(each, base, batch, None, StepOptions()), adapters)
    assert not own & weights
    assert weights <= shapes(lambda each: loss_and_gradients(each, batch, None, StepOptions()), base)


def test_over_quantized_weights_and_devices():
    """QLoRA: two steps and a loss are those over the dequantized base; and on eight devices those on one, masks too."""
    config = CONFIG.replace(hidden_size=32, num_attention_heads=8, ffn_dim=48, vocab_size=64, init_std=0.2, dropout=0.1)
    mesh = make_mesh("fsdp=2,sequence=2,tensor=2", jax.devices()[:8])
    quantization = optjax.Quantization("nf4", 8)
    one = optjax.quantize(optjax.init_params(config, jax.random.key(0), stacked=True), quantization)
    spread = optjax.init_params(config, jax.random.key(0), stacked=True, mesh=mesh)
    options = StepOptions(micro_batches=2, remat="full", loss_chunks=2)
    rows = np.random.default_rng(0).integers(3, 64, (8, 13)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * 6 + [0]], 8, axis=0).astype(np.int32)
    labels = np.where(segments != 0, rows[:, 1:], -100).astype(np.int32)
    batch = {"input_ids": rows[:, :-1], "labels": labels, "segment_ids": segments}
    # An eps so large that the update of a bias whose gradient is rounding error is small, as it should be.
    recipe, states, losses, validation = dataclasses.replace(RECIPE, eps=1e-2), [], [], []
    bases = one, optjax.dequantize(one), optjax.quantize(spread, quantization)
    for base in bases:
        state = random_state(base, options, bias="lora_only", lora_dropout=0.2)
        placed = place_batch(batch, base, 8)
        for _ in range(2):
            state, metrics = adapter_step(state, base, placed, recipe, 0, options)
        states.append(state)
        adapted = optjax.with_adapters(base, state.adapters)
        losses.append(float(metrics["loss"]))
        if base is not bases[1]:
            validation.append(evaluate(adapted, [batch], options)["loss"])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)
    np.testing.assert_allclose(*validation, rtol=1e-5)
    for state in states[1:]:
        for ours, theirs in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(states[0].adapters), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-6)
    target = abstract_adapter_state(bases[2], states[2].adapters.config, options)
    assert jax.tree.structure(target) == jax.tree.structure(states[2])
    for like, array in zip(jax.tree.leaves(target), jax.tree.leaves(states[2]), strict=True):
        assert (like.shape, like.dtype) == (array.shape, array.dtype)
        assert like.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_what_is_kept_is_small(tmp_path):
    """The state, and a checkpoint of it, hold adapters, two moments and scalars; it comes back bit for bit."""
    base = optjax.init_params(CONFIG.replace(vocab_size=20000), jax.random.key(0))
    state = random_state(base, modules_to_save=["final_layer_norm"], bias="all")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert numbers <= 3 * state.adapters.count + 8
    batch = next(batches("causal_lm"))
    state, _ = adapter_step(state, base, batch, RECIPE)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "state", abstract_adapter_state(base, state.adapters.config))
    on_disk = sum(file.stat().st_size for file in (tmp_path / "state").rglob("*") if file.is_file())
    assert on_disk < sum(leaf.nbytes for leaf in jax.tree.leaves(base)) / 4
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_a_step_that_is_not_finite_is_left_out():
    """Adapters and moments keep their bits; it is counted; under float16 the loss scale halves, and is undone."""
    base = optjax.init_params(CONFIG, jax.random.key(0), stacked=True)
    batch = next(batches("causal_lm"))
    options = StepOptions(dtype="float16")
    plain, scaled = random_state(base), random_state(base, options)
    _, metrics = adapter_step(plain, base, batch, RECIPE)
    half, other = adapter_step(scaled, base, batch, RECIPE, 0, options)
    assert float(other["loss_scale"]) > 1 and int(other["skipped"]) == 0
    np.testing.assert_allclose(float(other["grad_norm"]), float(metrics["grad_norm"]), rtol=2e-2)
    np.testing.assert_allclose(float(other["loss"]), float(metrics["loss"]), rtol=1e-2)
    kept = jax.tree.map(np.array, (half.adapters, half.moments))
    norm = jax.tree.map(lambda weight: weight * jnp.nan, base["final_layer_norm"])
    spoiled = dataclasses.replace(base, weights=base.weights | {"final_layer_norm": norm})
    scale = float(half.guard.loss_scale)
    after, metrics = adapter_step(half, spoiled, batch, RECIPE, 0, options)
    jax.tree.map(np.testing.assert_array_equal, (after.adapters, after.moments), kept)
    assert (int(after.step), int(after.guard.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert float(after.guard.loss_scale) == scale / 2
    again, metrics = adapter_step(after, base, batch, RECIPE, 0, options)
    assert int(metrics["skipped"]) == 0
    assert (np.asarray(again.adapters["layers"]["fc1"]["lora_A"]) != kept[0]["layers"]["fc1"]["lora_A"]).any()


def test_dropout_is_by_key():
    """The same key gives the same loss, another one another; a micro-batch has masks of its own."""
    base = optjax.init_params(CONFIG.replace(num_hidden_layers=1), jax.random.key(0))
    adapters = random_state(base, lora_dropout=0.5, target_modules=["q_proj", "fc2"]).adapters
    batch = jax.tree.map(lambda array: np.concatenate([array[:1]] * 2), next(batches("causal_lm")))

    @partial(jax.jit, static_argnums=1)
    def loss(key, parts):
        return loss_and_adapter_gradients(adapters, base, batch, key, StepOptions(micro_batches=parts))[0]

    keys = jax.random.key(0), jax.random.key(0), jax.random.key(1), None
    first, same, other, none = (float(loss(key, 1)) for key in keys)
    assert first == same and len({first, other, none}) == 3
    assert float(loss(None, 2)) == pytest.approx(none, rel=1e-6) and float(loss(keys[0], 2)) != pytest.approx(first)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: init_adapter_state(random_state(b).adapters, StepOptions(moments_dtype="bfloat16")), "small"),
        (lambda b: init_adapter_state(random_state(b).adapters, StepOptions(remat="offload")), "take 'full'"),
        (lambda b: random_state(optjax.with_adapters(b, random_state(b).adapters)), "no second ones"),
        (lambda b: adapter_step(random_state(b), optjax.offload(b), next(batches("causal_lm")), RECIPE), "the host"),
        (lambda b: adapter_step(random_state(b), optjax.stack_layers(b), next(batches("causal_lm")), RECIPE),
         "place_adapters"),
        (lambda b: init_adapter_state(optjax.init_adapters(b, LoraConfig(), jax.random.key(0), "bfloat16")),
         "trained in float32, these are bfloat16"),
        (lambda b: adapter_step(random_state(b), b, {"input_ids": np.ones((2, 3), int)}, RECIPE), "labels"),
        (lambda b: adapter_step(random_state(b), optjax.init_params(CONFIG.replace(ffn_dim=8), jax.random.key(0)),
         next(batches("causal_lm")), RECIPE), "another size"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(optjax.init_params(CONFIG, jax.random.key(0)))
