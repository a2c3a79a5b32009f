"""OPT in straight-line numpy, float64, written from the papers: a second opinion where no other implementation has one.

It knows head masks, norms without weights, and a `touch` hook at every place where dropout may act.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from optjax import OPTConfig

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def numpy_opt(
    state: dict[str, Any],
    config: OPTConfig,
    ids: np.ndarray,
    mask: np.ndarray | None = None,
    head_mask: np.ndarray | None = None,
    touch: Callable[[str, int, np.ndarray], np.ndarray] = lambda place, layer, x: x,
    skipped: Collection[int] = (),
) -> dict[str, Any]:
    """Hidden states, attentions ``[B, H, T, T]`` and logits of a causal LM with the weights ``state``, by HF's names.

    ``touch(place, layer, x)`` replaces x at the places "probabilities", "out_proj" and "fc2"; ``skipped`` layers are
    left out.
    """
    w = {name.removeprefix("model.decoder."): np.asarray(value, np.float64) for name, value in state.items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return y * w[name + ".weight"] + w[name + ".bias"] if config.layer_norm_elementwise_affine else y

    rows, length = ids.shape
    mask = np.ones((rows, length), bool) if mask is None else mask != 0
    heads = config.num_attention_heads
    table_rows = np.where(mask, np.cumsum(mask, axis=1) + 1, 1)

    x = w["embed_tokens.weight"][ids]
    if config.has_projections:
        x = linear(x, "project_in")
    x = x + w["embed_positions.weight"][table_rows]
    hidden, attentions = [], []

    for i in range(config.num_hidden_layers):
        hidden.append(x)
        if i in skipped:
            continue
        at = f"layers.{i}."
        y = norm(x, at + "self_attn_layer_norm") if config.do_layer_norm_before else x
        q, k, v = (
            linear(y, at + f"self_attn.{n}_proj").reshape(rows, length, heads, -1).transpose(0, 2, 1, 3) for n in "qkv"
        )
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
        open_ = np.tril(np.ones((length, length), bool)) & mask[:, None, None, :]
        scores = np.where(open_, scores, -1e300)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = touch("probabilities", i, weights / weights.sum(-1, keepdims=True))
        if head_mask is not None:
            weights = weights * head_mask[i][:, None, None]
        attentions.append(weights)
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(rows, length, -1)
        x = x + touch("out_proj", i, linear(y, at + "self_attn.out_proj"))
        if not config.do_layer_norm_before:
            x = norm(x, at + "self_attn_layer_norm")

        y = norm(x, at + "final_layer_norm") if config.do_layer_norm_before else x
        y = linear(ACTIVATIONS[config.activation_function](linear(y, at + "fc1")), at + "fc2")
        x = x + touch("fc2", i, y)
        if not config.do_layer_norm_before:
            x = norm(x, at + "final_layer_norm")

    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        x = norm(x, "final_layer_norm")
    if config.has_projections:
        x = linear(x, "project_out")
    hidden.append(x)
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = x @ w[head + ".weight"].T if head + ".weight" in w else None
    return {"hidden_states": hidden, "attentions": attentions, "logits": logits}
