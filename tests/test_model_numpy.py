"""What transformers' torch models lack: head masks that mask, norms without weights, and where dropout acts.

Judged by a straight-line numpy model, which is first held to transformers itself.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_models import assert_close, padded_masks, params_from, random_config, torch_model
from hf_models import state_of as weights_of
from numpy_opt import numpy_opt

import optjax
import optjax.attention
import optjax.layer

SEEDS = range(100, 108)


def _case(seed: int, **changes):
    rng = np.random.default_rng(seed)
    config = random_config(rng).replace(**changes)
    model = torch_model(config, "causal_lm", seed)
    state = weights_of(model)
    mask = padded_masks(rng, 3, 7)
    ids = np.where(mask, rng.integers(2, config.vocab_size, size=mask.shape), 1)
    return rng, config, model, state, ids, mask


@pytest.mark.parametrize("seed", SEEDS)
def test_the_numpy_model_is_transformers(seed):
    _, config, model, state, ids, mask = _case(seed)
    expected = numpy_opt(state, config, ids, mask)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    assert_close(theirs.logits, expected["logits"], mask)
    for a, b in zip(theirs.hidden_states, expected["hidden_states"], strict=True):
        assert_close(a, b, mask)


@pytest.mark.parametrize("seed", SEEDS)
def test_head_mask(seed):
    rng, config, _, state, ids, mask = _case(seed)
    shape = (config.num_hidden_layers, config.num_attention_heads)
    head_mask = rng.choice([0.0, 0.3, 1.0], size=shape)
    params = params_from(state, config, "causal_lm", stacked=seed % 2 == 0)

    expected = numpy_opt(state, config, ids, mask, head_mask)
    out = optjax.causal_lm(params, ids, attention_mask=mask, head_mask=head_mask, output_attentions=True)
    assert_close(out.logits, expected["logits"], mask)
    for a, b in zip(out.attentions, expected["attentions"], strict=True):
        assert_close(np.moveaxis(a, 1, 2), np.moveaxis(b, 1, 2), mask)

    cache = optjax.init_cache(params, 3, 7, layout=("heads", "flat")[seed % 2])
    out = optjax.causal_lm(params, ids, attention_mask=mask, head_mask=head_mask, cache=cache)
    assert_close(out.logits, expected["logits"], mask)


def test_one_head_mask_for_all_layers():
    _, config, _, state, ids, mask = _case(7, num_attention_heads=2, hidden_size=6, num_hidden_layers=3)
    params = params_from(state, config, "causal_lm")
    every = optjax.causal_lm(params, ids, head_mask=np.array([[0, 1]] * 3)).logits
    for one in ([0, 1], np.array([False, True]), np.array([0.0, 1.0])):
        np.testing.assert_array_equal(optjax.causal_lm(params, ids, head_mask=one).logits, every)
    assert not np.allclose(every, optjax.causal_lm(params, ids).logits)


@pytest.mark.parametrize("before", [True, False])
def test_no_affine(before):
    """Hugging Face crashes on this switch, so its model stands in with weights of one; here nothing stands in."""
    _, config, _, state, ids, mask = _case(3, layer_norm_elementwise_affine=False, do_layer_norm_before=before)
    state = {name: value for name, value in state.items() if "norm" not in name}
    params = params_from(state, config, "causal_lm")
    assert "self_attn_layer_norm" not in params["layers"][0]
    expected = numpy_opt(state, config, ids, mask)
    assert_close(optjax.causal_lm(params, ids, attention_mask=mask).logits, expected["logits"], mask)


@pytest.mark.parametrize("place", ["probabilities", "residuals"])
@pytest.mark.parametrize("before", [True, False])
def test_dropout_acts_where_it_should(place, before, monkeypatch):
    """With dropout replaced by a fixed pattern, the model is the numpy model with that pattern in that place alone."""
    import jax
    import jax.numpy as jnp

    rates = {"attention_dropout": 0.25} if place == "probabilities" else {"dropout": 0.25}
    changes = {"dropout": 0.0, "attention_dropout": 0.0, "do_layer_norm_before": before, "num_hidden_layers": 2} | rates
    _, config, _, state, ids, mask = _case(11, **changes)

    def pattern(x):
        return x * (1 + np.arange(x.shape[-1]) % 3)

    def touch(where, layer, x):
        touched = where == "probabilities" if place == "probabilities" else where != "probabilities"
        return pattern(x) if touched else x

    monkeypatch.setattr(optjax.attention, "_drop_weights", lambda x, rate, *_: pattern(x))
    monkeypatch.setattr(optjax.layer, "drop", lambda x, rate, key: pattern(x))
    expected = numpy_opt(state, config, ids, mask, touch=touch)
    params = params_from(state, config, "causal_lm")
    with jax.disable_jit():
        out = optjax.causal_lm(params, jnp.asarray(ids), attention_mask=mask, dropout_key=jax.random.key(0))
    assert_close(out.logits, expected["logits"], mask)
