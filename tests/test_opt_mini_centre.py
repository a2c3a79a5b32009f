"""Embeddings about their mean are the same model, of which codes in 8 bits are nearer to what they stand for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optjax
from optjax import OPTConfig, init_params
from optjax.train.opt_mini.centre import centre

CONFIG = OPTConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, max_position_embeddings=40
)


def far(config: OPTConfig) -> optjax.Params:
    """Params of which half the rows are far away in one direction, as training leaves tokens that never come."""
    params = init_params(config, jax.random.key(0), scheme="hf")
    rows = table(params)
    away = jax.random.normal(jax.random.key(1), rows.shape[1:]) * 0.3
    params.weights["embed_tokens"]["weight"] = rows.at[: len(rows) // 2].add(away)
    return params


def table(params: optjax.Params) -> jax.Array:
    return params.weights["embed_tokens"]["weight"]


def logprobs(params, ids) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(optjax.causal_lm(params, ids).logits))


def test_probabilities_stay():
    params, ids = far(CONFIG), np.random.default_rng(0).integers(4, 97, (3, 17))
    moved = centre(params)
    np.testing.assert_allclose(table(moved).mean(0), 0, atol=1e-6)
    assert not jnp.allclose(optjax.causal_lm(moved, ids).logits, optjax.causal_lm(params, ids).logits, atol=1e-3)
    np.testing.assert_allclose(logprobs(moved, ids), logprobs(params, ids), atol=2e-5)


def test_codes_are_nearer():
    """Half of the rows are far: about the mean they are half as far, and so are the steps of their codes."""

    def largest_error(params) -> float:
        coded = optjax.dequantize(optjax.quantize(params, "int8"))
        return float(jnp.abs(table(coded) - table(params)).max())

    params = far(CONFIG)
    assert 0 < largest_error(centre(params)) < 0.7 * largest_error(params)


def test_other_tables_are_refused():
    for more in ({"word_embed_proj_dim": 16}, {"tie_word_embeddings": False}):
        with pytest.raises(ValueError, match="only a table that is the head"):
            centre(init_params(dataclasses.replace(CONFIG, **more), jax.random.key(0)))
