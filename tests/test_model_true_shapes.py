"""The real sizes, with random weights, against transformers: widths and depths where rounding errors could add up."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import assert_close, hf_config, state_of
from transformers import OPTForCausalLM
from transformers.modeling_utils import no_init_weights

import optjax
from optjax import OPTConfig
from optjax.params import build_params


@pytest.mark.parametrize("size", ["opt-125m", "opt-350m"])
def test_true_shapes(size):
    config = OPTConfig.preset(size)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, size=(2, 24))
    mask = np.ones_like(ids)
    mask[1, :7] = 0

    with no_init_weights():
        model = OPTForCausalLM(hf_config(config)).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # The published weights have this size; the embeddings larger ones, or all logits would be alike.
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.3 if "embed" in name else 0.04, generator=generator)
        expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    # Weight by weight, so that the two models never stand in memory together.
    state = state_of(model)
    del model, state["lm_head.weight"]
    gc.collect()
    params = build_params(config, "causal_lm", lambda weight, layer: jnp.array(state.pop(weight.hf_name(layer))))
    assert not state

    assert optjax.count_params(config) == sum(w.size for w in jax.tree.leaves(params))
    assert_close(optjax.causal_lm(params, ids, attention_mask=mask).logits, expected, mask)

    cache = optjax.init_cache(params, 2, 24)
    first = optjax.causal_lm(params, ids[:, :23], attention_mask=mask[:, :23], cache=cache)
    second = optjax.causal_lm(params, ids[:, 23:], cache=first.cache)
    assert_close(second.logits[:, 0], expected[:, 23])
    np.testing.assert_array_equal(np.argmax(second.logits[:, 0], -1), np.argmax(expected[:, 23], -1))
