"""Hugging Face's torch models beside ours: random configs, random weights, and params made of the torch weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from optjax import OPTConfig, Params
from optjax.config import ACTIVATIONS
from optjax.params import build_params

torch.set_num_threads(1)

CLASSES = {
    None: transformers.OPTModel,
    "causal_lm": transformers.OPTForCausalLM,
    "sequence_classification": transformers.OPTForSequenceClassification,
    "question_answering": transformers.OPTForQuestionAnswering,
}


def random_config(rng: np.random.Generator) -> OPTConfig:
    """A tiny config drawn over every switch of the architecture, with odd sizes."""

    def flip(probability: float) -> bool:
        return bool(rng.random() < probability)

    heads, head_dim = int(rng.integers(1, 5)), int(rng.choice([1, 2, 3, 5, 8]))
    head_dim = max(head_dim, -(-4 // heads))  # a norm over two numbers multiplies what float32 rounds
    hidden = heads * head_dim
    return OPTConfig(
        vocab_size=int(rng.integers(7, 61)),
        hidden_size=hidden,
        num_hidden_layers=int(rng.integers(1, 3)),
        num_attention_heads=heads,
        ffn_dim=int(rng.integers(1, 40)),
        max_position_embeddings=int(rng.integers(9, 20)),
        do_layer_norm_before=flip(0.6),
        _remove_final_layer_norm=flip(0.3),
        word_embed_proj_dim=int(rng.choice([hidden, max(1, hidden // 2), hidden + 3])),
        activation_function=str(rng.choice(ACTIVATIONS)),
        enable_bias=flip(0.7),
        layer_norm_elementwise_affine=flip(0.7),
        tie_word_embeddings=flip(0.6),
        num_labels=int(rng.integers(1, 5)),
    )


def hf_config(config: OPTConfig) -> transformers.OPTConfig:
    # Hugging Face cannot construct norms without weights; with weights of 1 and biases of 0 it is the same model.
    fields = config.replace(layer_norm_elementwise_affine=True).to_dict()
    return transformers.OPTConfig(**fields, attn_implementation="eager")


def torch_model(config: OPTConfig, head: str | None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A torch model in eval mode whose every weight, biases and norms included, is random and of consequence."""
    model = CLASSES[head](hf_config(config)).eval()
    # Else torch would keep the pad token's embedding from learning, even where that token is a real one.
    model.get_input_embeddings().padding_idx = None
    rng = np.random.default_rng(seed)
    for name, weight in model.named_parameters():
        value = rng.standard_normal(weight.shape)
        if "norm" in name:
            affine = config.layer_norm_elementwise_affine
            value = name.endswith("weight") + 0.3 * value * affine
        elif weight.ndim == 1:
            value = 0.3 * value
        elif "embed" not in name:
            value = value * weight.shape[1] ** -0.5
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.broadcast_to(value, tuple(weight.shape)).copy()))
    return model.to(dtype)


def state_of(model: Any, gradients: bool = False) -> dict[str, np.ndarray]:
    """The model's weights, or their gradients, by the names of a causal LM's state dict."""
    state = dict(model.named_parameters() if gradients else model.state_dict())
    prefix = "" if hasattr(model, "model") else "model."
    pick = (lambda w: w.grad) if gradients else (lambda w: w)
    return {prefix + name: pick(w).detach().numpy() for name, w in state.items()}


def params_from(
    state: dict[str, np.ndarray], config: OPTConfig, head: str | None, stacked: bool = False, dtype: Any = None
) -> Params:
    """Our params from tensors by Hugging Face's names."""

    def leaf(weight, layer):
        if weight.per_layer and stacked:
            value = np.stack([state[weight.hf_name(i)] for i in range(config.num_hidden_layers)])
        else:
            value = state[weight.hf_name(layer)]
        return jnp.asarray(value, dtype)

    return build_params(config, head, leaf, stacked=stacked)


def padded_masks(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Masks ``[rows, length]``: a row is padded left, right or on both sides, holed, or whole, and never empty."""
    mask = np.ones((rows, length), np.int64)
    for row in mask:
        left, right = rng.integers(0, length // 2 + 1, size=2)
        kind = rng.choice(["left", "right", "both", "holes", "whole"])
        if kind in ("left", "both"):
            row[:left] = 0
        if kind in ("right", "both"):
            row[length - right + (kind == "both") :] = 0
        if kind == "holes":
            row[rng.random(length) < 0.4] = 0
        if not row.any():
            row[rng.integers(length)] = 1
    return mask


def assert_close(ours: Any, theirs: Any, where: np.ndarray | None = None, tolerance: float = 1e-5) -> None:
    """Largest difference at most ``tolerance`` of the largest value; only at ``where`` (``[B, T]``), if given."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    if where is not None:
        ours, theirs = ours[where != 0], theirs[where != 0]
    assert np.isfinite(theirs).all()
    difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert difference <= tolerance * largest, f"differs by {difference:.3g}, of values up to {largest:.3g}"
