"""Params: counts, shapes, initialization, the two layouts, and use as a plain pytree."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import CLASSES, hf_config, random_config

import optjax
from optjax import OPTConfig
from optjax.declaration import HEADS, declare
from optjax.presets import PRESETS

TINY = OPTConfig(
    vocab_size=50, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, ffn_dim=20, max_position_embeddings=16
)
# Zhang et al. 2022, with the tied head counted once.
COUNTS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
}
# Taylor et al. 2022, table 5.
GALACTICA = {
    "galactica-125m": 125e6,
    "galactica-1.3b": 1.3e9,
    "galactica-6.7b": 6.7e9,
    "galactica-30b": 30e9,
    "galactica-120b": 120e9,
}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_counts():
    assert {name: optjax.count_params(OPTConfig.preset(name)) for name in COUNTS} == COUNTS
    for name, published in GALACTICA.items():
        assert optjax.count_params(OPTConfig.preset(name)) == pytest.approx(published, rel=0.02)
    assert set(COUNTS) | set(GALACTICA) == set(PRESETS)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_of_transformers(head, seed):
    """Names and shapes of all weights, against a torch model that holds none."""
    config = random_config(np.random.default_rng(seed)).replace(layer_norm_elementwise_affine=True)
    with torch.device("meta"):
        model = CLASSES[head](hf_config(config))
    prefix = "" if hasattr(model, "model") else "model."
    theirs = {prefix + name: tuple(weight.shape) for name, weight in model.named_parameters()}
    ours = {
        weight.hf_name(layer): weight.shape
        for weight in declare(config, head)
        for layer in (range(config.num_hidden_layers) if weight.per_layer else [None])
    }
    assert ours == theirs
    assert optjax.count_params(config, head) == model.num_parameters()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stacked", [False, True])
def test_abstract_and_real_shapes_agree(head, stacked):
    config = TINY.replace(word_embed_proj_dim=8, tie_word_embeddings=False)
    real = optjax.init_params(config, jax.random.key(0), jnp.bfloat16, head, stacked=stacked)
    abstract = optjax.abstract_params(config, jnp.bfloat16, head, stacked=stacked)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), real) == abstract
    assert real.stacked == abstract.stacked == stacked
    assert sum(leaf.size for leaf in jax.tree.leaves(real)) == optjax.count_params(config, head)
    other = (optjax.unstack_layers if stacked else optjax.stack_layers)(abstract)
    assert other == optjax.abstract_params(config, jnp.bfloat16, head, stacked=not stacked)


def test_init_distribution():
    config = OPTConfig(
        vocab_size=500,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=500,
        word_embed_proj_dim=64,
        tie_word_embeddings=False,
        init_std=0.05,
    )
    for scheme in ("hf", "paper"):
        params = optjax.init_params(config, jax.random.key(3), scheme=scheme)
        seen = set()
        for weight in declare(config):
            for layer in range(4) if weight.per_layer else [None]:
                leaf: Any = params.weights
                for step in weight.keys(layer):
                    leaf = leaf[step]
                leaf = np.array(leaf, np.float64)
                if weight.kind in ("bias", "norm_bias"):
                    assert (leaf == 0).all()
                    continue
                if weight.kind == "norm_weight":
                    assert (leaf == 1).all()
                    continue
                if weight.path == "embed_tokens.weight":
                    assert (leaf[1] == 0).all() == (scheme == "hf")
                    leaf = np.delete(leaf, 1, axis=0)
                std = 0.05 / 8**0.5 if scheme == "paper" and weight.kind == "output" else 0.05
                # Standard errors of a normal sample: std/√n of the mean, std/√(2n) of the deviation.
                assert abs(leaf.mean()) < 5 * std / leaf.size**0.5
                assert abs(leaf.std() - std) < 5 * std / (2 * leaf.size) ** 0.5
                assert abs(leaf).max() > 3 * std
                seen.add(leaf.ravel()[:3].tobytes())
        assert len(seen) == 4 + 4 * 6 + 1  # no two weights alike


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_is_the_same_in_every_layout_and_dtype(dtype):
    config = TINY.replace(word_embed_proj_dim=8)
    listed = optjax.init_params(config, jax.random.key(1), dtype)
    stacked = optjax.init_params(config, jax.random.key(1), dtype, stacked=True)
    assert bits(optjax.unstack_layers(stacked)) == bits(listed)
    assert bits(jax.tree.map(lambda x: x.astype(dtype), optjax.init_params(config, jax.random.key(1)))) == bits(listed)
    assert bits(optjax.init_params(config, jax.random.PRNGKey(1), dtype)) == bits(listed)
    assert bits(optjax.init_params(config, jax.random.key(2), dtype)) != bits(listed)


def test_stacking_goes_both_ways_bit_for_bit():
    listed = optjax.init_params(TINY, jax.random.key(0), head="question_answering")
    stacked = optjax.stack_layers(listed)
    assert stacked["layers"]["fc1"]["weight"].shape == (3, 20, 12)
    assert bits(stacked["layers"]["fc1"]["weight"][1]) == bits(listed["layers"][1]["fc1"]["weight"])
    back = optjax.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(listed) and bits(back) == bits(listed)
    assert optjax.stack_layers(stacked) is stacked and optjax.unstack_layers(listed) is listed
    assert bits(listed.layer(2)) == bits(stacked.layer(2))


def test_a_plain_pytree(tmp_path):
    optax = pytest.importorskip("optax")
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params = optjax.init_params(TINY, jax.random.key(0))

    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p))(params)
    assert isinstance(doubled, optjax.Params) and doubled.config == TINY and doubled.head == "causal_lm"
    np.testing.assert_array_equal(doubled["layers"][0]["fc1"]["weight"], 2 * params["layers"][0]["fc1"]["weight"])

    ids = np.arange(10).reshape(2, 5)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: optjax.causal_lm(p, ids, labels=ids).loss))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    optimizer = optax.adamw(1e-2)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    better = optax.apply_updates(params, updates)
    assert optjax.causal_lm(better, ids, labels=ids).loss < loss

    pair = jax.tree.map(lambda *x: jnp.stack(x), params, better)
    logits = jax.vmap(lambda p: optjax.causal_lm(p, ids).logits)(pair)
    np.testing.assert_allclose(logits[1], optjax.causal_lm(better, ids).logits, atol=1e-5)

    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", optjax.abstract_params(TINY))
    assert restored.config == TINY and bits(restored) == bits(params)

    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), dataclasses.replace(params)):
        assert jax.tree.structure(other) == jax.tree.structure(params) and bits(other) == bits(params)


def test_what_init_refuses():
    key = jax.random.key(0)
    for arguments, message in [
        (dict(config=TINY, key=key, head="lm"), "no head named 'lm'; there are: None, 'causal_lm', "),
        (dict(config=TINY, key=key, scheme="xavier"), "no initialization scheme 'xavier'; there are: hf, paper"),
        (dict(config=TINY, key=key, dtype=jnp.int32), "expected a floating dtype"),
        (dict(config=TINY, key=key, dtype="float31"), "expected a floating dtype"),
        (dict(config=TINY, key=key, dtype="float8_e4m3fn"), "expected a floating dtype"),
        (dict(config=TINY, key=key, dtype=np.float64), "jax_enable_x64"),
        (dict(config=TINY, key=0), "expected a PRNG key such as jax.random.key"),
        (dict(config=TINY, key=jax.random.split(key)), "expected a PRNG key such as jax.random.key"),
        (dict(config=TINY, key=np.zeros(5, np.uint32)), "not the data of a PRNG key"),
        (dict(config="opt-125m", key=key), "expected an OPTConfig, got str"),
    ]:
        with pytest.raises(ValueError, match=message):
            optjax.init_params(**arguments)
