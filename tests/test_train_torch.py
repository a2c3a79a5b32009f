"""A hundred train steps are those of torch: its AdamW, its clipping, and transformers' model, in float32."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

from optjax import OPTConfig, init_params
from optjax.params import Params, stack_layers, unstack_layers
from optjax.train.optimizer import Recipe
from optjax.train.options import PLAIN, StepOptions
from optjax.train.state import init_state, train_step

CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=15,
    num_hidden_layers=2,
    ffn_dim=23,
    num_attention_heads=3,
    max_position_embeddings=12,
    dropout=0.0,
)
ACCUMULATED = StepOptions(micro_batches=3, remat="full", query_block=4, loss_chunks=2)
STEPS = 100
RECIPE = Recipe(peak_lr=3e-3, total_steps=STEPS, warmup_steps=10, decay_from=20, clip_norm=1.0)
B, T = 6, 12


def lr_of(step: int) -> float:
    """Up in 10 steps, level until 20, down to a tenth."""
    if step < 20:
        return 3e-3 * min(1.0, (step + 1) / 10)
    return 3e-3 * (1 - 0.9 * (step + 1 - 20) / 80)


def by_name(params: Params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(unstack_layers(params).weights)
    return {".".join(str(getattr(s, "key", getattr(s, "idx", None))) for s in path): np.array(x) for path, x in leaves}


def torch_model(params: Params) -> transformers.OPTForCausalLM:
    fields = {k: v for k, v in params.config.to_dict().items() if k != "model_type"}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**fields, attn_implementation="eager")).train()
    named = {f"model.decoder.{name}": torch.tensor(weight) for name, weight in by_name(params).items()}
    missing = model.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model


def batch_of(step: int) -> dict[str, np.ndarray]:
    # No <pad>: transformers gives its row no gradient, and no text holds it. Text that can be learned: ids count up.
    rng = np.random.default_rng([7, step])
    records = (rng.integers(0, 59, (B, 1)) + np.arange(T + 1) * rng.integers(1, 4, (B, 1))) % 59 + 2
    return {"input_ids": records[:, :-1].astype(np.int32), "labels": records[:, 1:].astype(np.int32)}


@pytest.fixture(scope="module")
def theirs():
    """Losses and gradient norms of every step, and the weights after the last, by torch."""
    model = torch_model(init_params(CONFIG, jax.random.key(3)))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        batch = {name: torch.from_numpy(array).long() for name, array in batch_of(step).items()}
        logits = model(batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"].reshape(-1))
        adamw.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip_norm).item())
        for group in adamw.param_groups:
            group["lr"] = lr_of(step)
        adamw.step()
        losses.append(loss.item())
    weights = {k.removeprefix("model.decoder."): v.detach().numpy() for k, v in model.state_dict().items()}
    return losses, norms, weights


@pytest.mark.parametrize("stacked, levers", [(False, PLAIN), (True, PLAIN), (True, ACCUMULATED)])
def test_a_hundred_steps_equal_torch(theirs, stacked, levers):
    """Losses, gradient norms and weights over warm-up, plateau and decay, the gradient clipped at some steps."""
    params = init_params(CONFIG, jax.random.key(3))
    state = init_state(stack_layers(params) if stacked else params)
    found = []
    for step in range(STEPS):
        state, metrics = train_step(state, batch_of(step), RECIPE, options=levers)
        found.append(metrics)
    losses, norms, weights = theirs
    assert min(norms) < RECIPE.clip_norm < max(norms) and losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose([float(m["loss"]) for m in found], losses, rtol=1e-5)
    np.testing.assert_allclose([float(m["grad_norm"]) for m in found], norms, rtol=1e-5)
    np.testing.assert_allclose([float(m["lr"]) for m in found], [lr_of(step) for step in range(STEPS)], rtol=1e-5)
    for name, weight in by_name(state.params).items():
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding error, which AdamW scales up to full steps
        np.testing.assert_allclose(weight, weights[name], rtol=0, atol=2e-5 * np.abs(weights[name]).max(), err_msg=name)
