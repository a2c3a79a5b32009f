"""The model against FlaxOPT, run here, and against TFOPT's recorded answers (tests/golden/make_tf.py)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_models import assert_close, hf_config, padded_masks, params_from, state_of, torch_model

import optjax
from optjax import OPTConfig

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("which", ["", "_head_mask"])
@pytest.mark.parametrize("stacked", [False, True])
def test_tensorflow(name, which, stacked):
    golden = np.load(GOLDEN / f"tf_{name}.npz")
    config = OPTConfig.from_dict(json.loads(str(golden["config"])))
    state = {key.removeprefix("weights/"): golden[key] for key in golden.files if key.startswith("weights/")}
    params = params_from(state, config, "causal_lm", stacked)
    ids, mask = golden["ids"], golden["mask"]
    out = optjax.causal_lm(
        params,
        ids,
        attention_mask=mask,
        head_mask=golden["head_mask"] if which else None,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert_close(out.logits, golden["logits" + which], mask)
    assert_close(out.hidden_states[-1], golden["last_hidden_state" + which], mask)
    for ours, theirs in zip(out.attentions, golden["attentions" + which], strict=True):
        assert_close(np.moveaxis(ours, 1, 2), np.moveaxis(theirs, 1, 2), mask)


# FlaxOPT knows neither models without biases nor wider embeddings; what it does know is drawn here.
FLAX = {
    "pre_norm": {"activation_function": "gelu"},
    "post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 7},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu_new"},
}


@pytest.mark.parametrize("name", FLAX)
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_flax(name):
    from transformers import FlaxOPTForCausalLM

    config = OPTConfig(
        vocab_size=41,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_dim=20,
        max_position_embeddings=16,
        **FLAX[name],
    )
    state = state_of(torch_model(config, "causal_lm", seed=5))
    theirs = FlaxOPTForCausalLM(hf_config(config), input_shape=(1, 4), _do_init=True)

    def flax_weight(path, leaf):
        *parents, last = [step.key for step in path]
        value = state[".".join([*parents, "bias" if last == "bias" else "weight"])]
        value = value.T if last == "kernel" else value
        assert value.shape == leaf.shape
        return value

    theirs.params = jax.tree_util.tree_map_with_path(flax_weight, theirs.params)
    rng = np.random.default_rng(1)
    mask = padded_masks(rng, 3, 7)
    ids = np.where(mask, rng.integers(3, 41, size=mask.shape), 1)
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    params = params_from(state, config, "causal_lm")
    out = optjax.causal_lm(params, ids, attention_mask=mask, output_hidden_states=True)
    assert_close(out.logits, expected.logits, mask)
    for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b, mask)
