"""Losses and the gradients of every weight, and of the embeddings given, against torch autograd."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import params_from, state_of, torch_model

import optjax
from optjax import OPTConfig
from optjax.declaration import declare

SIZES: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    ffn_dim=20,
    max_position_embeddings=16,
    num_labels=4,
)
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu"},
    "post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 7, "activation_function": "gelu_new"},
    "bare": {"enable_bias": False, "_remove_final_layer_norm": True, "activation_function": "silu"},
}
RNG = np.random.default_rng(0)
MASK = np.ones((3, 6), np.int64)
MASK[0, :2] = 0
MASK[1, 4:] = 0
IDS = np.where(MASK, RNG.integers(3, 37, size=MASK.shape), 1)
LABELS = np.where(MASK * np.roll(MASK, 1, axis=1), IDS, -100)
LABELS[2, 3] = -100


def language_model_loss(params, labels):
    return optjax.causal_lm(params, IDS, attention_mask=MASK, labels=labels).loss


def question_answering_loss(params, spans):
    start, end = spans
    # No left padding: the loss counts every position's logits, and what a query sees that has nothing to look at
    # (all keys alike, in both models) has no gradient for q and k here and a meaningless one there.
    mask = MASK | (np.arange(6) == 0)
    return optjax.question_answering(params, IDS, attention_mask=mask, start_positions=start, end_positions=end).loss


def classification_loss(kind):
    def loss(params, labels):
        return optjax.sequence_classification(params, IDS, attention_mask=MASK, labels=labels, problem_type=kind).loss

    return loss


CASES: dict[str, tuple[str, Any, Any]] = {
    "question_answering": ("question_answering", question_answering_loss, (np.array([0, 2, 9]), np.array([8, 3, 5]))),
} | {
    kind: ("sequence_classification", classification_loss(kind), labels)
    for kind, labels in {
        "regression": RNG.standard_normal((3, 4)).astype(np.float32),
        "single_label_classification": np.array([3, 0, 1]),
        "multi_label_classification": np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32),
    }.items()
}


def assert_gradients(ours: optjax.Params, model: Any, head: str | None) -> None:
    prefix = "" if hasattr(model, "model") else "model."
    theirs = {prefix + name: weight.grad.numpy() for name, weight in model.named_parameters()}
    ours = optjax.unstack_layers(ours)
    # A gradient that is zero in truth, as that of k_proj's bias is, is rounding in both: hence the second scale.
    overall = max(np.abs(g).max() for g in theirs.values())
    for weight in declare(ours.config, head):
        for layer in range(ours.config.num_hidden_layers) if weight.per_layer else [None]:
            a: Any = ours.weights
            for step in weight.keys(layer):
                a = a[step]
            b = theirs.pop(weight.hf_name(layer))
            error, limit = np.abs(np.asarray(a) - b).max(), 1e-5 * max(np.abs(b).max(), 0.01 * overall)
            assert error <= limit, f"{weight.hf_name(layer)}: {error:.3g} > {limit:.3g}"
    assert not theirs


@pytest.mark.parametrize(
    ("name", "stacked"), [*((name, False) for name in MODELS), ("tied", True), ("post_norm", True)]
)
def test_language_model(name, stacked):
    config = OPTConfig(**SIZES, **MODELS[name])
    model = torch_model(config, "causal_lm", seed=1)
    mask, ids, labels = (torch.from_numpy(x) for x in (MASK, IDS, LABELS))
    expected = model(ids, attention_mask=mask, labels=labels).loss
    expected.backward()

    params = params_from(state_of(model), config, "causal_lm", stacked)
    program = jax.jit(jax.value_and_grad(language_model_loss))
    loss, grads = program(params, LABELS)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert_gradients(grads, model, "causal_lm")

    loss, grads = program(params, np.full_like(LABELS, -100))
    assert loss == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", CASES)
def test_other_heads(name):
    head, function, labels = CASES[name]
    config = OPTConfig(**SIZES)
    model = torch_model(config, head, seed=2)
    model.config.problem_type = name
    mask, ids = torch.from_numpy(MASK), torch.from_numpy(IDS)
    if head == "question_answering":
        start, end = (torch.from_numpy(x) for x in labels)
        mask = mask | (torch.arange(6) == 0)
        expected = model(ids, attention_mask=mask, start_positions=start, end_positions=end).loss
    else:
        given = torch.from_numpy(labels)
        expected = model(ids, attention_mask=mask, labels=given).loss
    expected.backward()

    params = params_from(state_of(model), config, head)
    program = jax.jit(jax.value_and_grad(function))
    loss, grads = program(params, labels)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert_gradients(grads, model, head)

    ignored = {
        "question_answering": (np.array([-100, -1, 6]), np.array([7, 100, -5])),
        "single_label_classification": np.full(3, -100),
    }
    if name in ignored:
        loss, grads = program(params, ignored[name])
        assert loss == 0
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["tied", "post_norm"])
def test_gradients_of_embeddings(name):
    config = OPTConfig(**SIZES, **MODELS[name])
    model = torch_model(config, "causal_lm", seed=3)
    embeds = model.get_input_embeddings()(torch.from_numpy(IDS)).detach().requires_grad_()
    model(inputs_embeds=embeds, attention_mask=torch.from_numpy(MASK), labels=torch.from_numpy(LABELS)).loss.backward()

    params = params_from(state_of(model), config, "causal_lm")

    def loss(embeds):
        return optjax.causal_lm(params, inputs_embeds=embeds, attention_mask=MASK, labels=LABELS).loss

    assert embeds.grad is not None
    ours, theirs = jax.jit(jax.grad(loss))(jnp.asarray(embeds.detach().numpy(), jnp.float32)), embeds.grad.numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
