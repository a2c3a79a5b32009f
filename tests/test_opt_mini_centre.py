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
    """Params of which some rows were pushed far away in one direction, as training does to tokens that never come."""
    params = init_params(config, jax.random.key(0), scheme="hf")
    table = params.weights["embed_tokens"]["weight"]
    away = jax.random.normal(jax.random.key(1), table.shape[1:]) * 0.3
    params.weights["embed_tokens"]["weight"] = table.at[: len(table) // 4].add(away)
    return params


def logprobs(params, ids) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(optjax.causal_lm(params, ids).logits))


def test_probabilities_stay():
    params, ids = far(CONFIG), np.random.default_rng(0).integers(4, 97, (3, 17))
    moved = centre(params)
    np.testing.assert_allclose(moved.weights["embed_tokens"]["weight"].mean(0), 0, atol=1e-6)
    assert not jnp.allclose(optjax.causal_lm(moved, ids).logits, optjax.causal_lm(params, ids).logits, atol=1e-3)
    np.testing.assert_allclose(logprobs(moved, ids), logprobs(params, ids), atol=2e-5)


def test_other_tables_are_refused():
    for more in ({"word_embed_proj_dim": 16}, {"tie_word_embeddings": False}):
        with pytest.raises(ValueError, match="only a table that is the head"):
            centre(init_params(dataclasses.replace(CONFIG, **more), jax.random.key(0)))
