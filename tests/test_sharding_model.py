"""Eight devices compute what one does: every rule set, every switch of the architecture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optjax
from optjax import OPTConfig
from optjax.sharding import RULES, make_mesh

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    ffn_dim=48,
    max_position_embeddings=30,
    dropout=0.0,
    bos_token_id=2,
)
ARCHITECTURES = {
    "plain": {},
    "post-norm, projections": dict(do_layer_norm_before=False, word_embed_proj_dim=16, activation_function="gelu"),
    "no biases, no norm weights": dict(enable_bias=False, layer_norm_elementwise_affine=False),
    "untied, no final norm": dict(tie_word_embeddings=False, _remove_final_layer_norm=True, activation_function="silu"),
}
# Mesh axes that a rule set leaves to the batch are there too.
SPREADS = {
    "data": "data=2,fsdp=2,tensor=2",
    "fsdp": "data=2,fsdp=2,sequence=2",
    "tensor": "data=1,fsdp=2,tensor=4",
    "fsdp+tensor": "fsdp=4,tensor=2",
    "fsdp+tensor+sequence": "fsdp=2,sequence=2,tensor=2",
}
B, T = 8, 12


def data(config):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, size=(B, T))
    mask = np.ones((B, T), int)
    mask[1, :3] = mask[2, 9:] = mask[5, :11] = 0
    return ids, mask


def close(ours, alone, what="", least=0.0):
    """To 1e-5 of the largest element, or of ``least`` where all are smaller."""
    ours, alone = np.asarray(ours), np.asarray(alone)
    assert ours.shape == alone.shape
    error, scale = np.abs(ours - alone).max(), max(np.abs(alone).max(), least)
    assert error <= 1e-5 * scale, f"{what}: off by {error:.1e} of {scale:.1e}"


def loss(params, ids, mask):
    out = optjax.causal_lm(params, ids, labels=jnp.where(mask, ids, -100), attention_mask=mask)
    return out.loss, out.logits


_loss_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))


def trees(config, rules, stacked):
    options = dict(key=jax.random.key(3), scheme="hf", stacked=stacked)
    config = config.replace(init_std=0.3)
    mesh = make_mesh(SPREADS[rules], jax.devices()[:8])
    return optjax.init_params(config, **options), optjax.init_params(config, **options, mesh=mesh, rules=rules)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_language_model(name, rules):
    stacked = len(name) % 2 == 0
    alone, spread = trees(OPTConfig(**SIZES, **ARCHITECTURES[name]), rules, stacked)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(one, many)
    ids, mask = data(alone.config)
    (expected, logits), grads = _loss_and_gradients(alone, ids, mask)
    (found, logits8), grads8 = _loss_and_gradients(spread, ids, mask)
    close(found, expected)
    close(np.asarray(logits8)[mask > 0], np.asarray(logits)[mask > 0])
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for (path, g), g8, w8 in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(grads8), jax.tree.leaves(spread), strict=True
    ):
        where = jax.tree_util.keystr(path)
        # The softmax does not feel a bias of all keys: its gradient is 0 but for rounding.
        close(g8, g, where, least=largest if "['k_proj']['bias']" in where else 0.0)
        assert g8.sharding.is_equivalent_to(w8.sharding, g8.ndim), where


@pytest.mark.parametrize("rules", ["fsdp", "fsdp+tensor"])
def test_few_tokens_come_to_the_head_and_back(rules):
    """So few that the head is not gathered for them; in a loss and its gradients, too."""
    alone, spread = trees(OPTConfig(**SIZES | {"hidden_size": 64}), rules, stacked=False)
    ids = data(alone.config)[0][:4, :2]
    assert spread.placement.tokens_travel_to_head(ids.shape, 64, 64)
    (expected, logits), grads = _loss_and_gradients(alone, ids, np.ones_like(ids))
    (found, logits8), grads8 = _loss_and_gradients(spread, ids, np.ones_like(ids))
    close(found, expected)
    close(logits8, logits)
    close(grads8["embed_tokens"]["weight"], grads["embed_tokens"]["weight"])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generated_ids(name, rules):
    alone, spread = trees(OPTConfig(**SIZES, **ARCHITECTURES[name]), rules, stacked=False)
    ids, mask = data(alone.config)
    rows = B if name == "plain" else 1 + len(name) % 3
    options = dict(max_new_tokens=9, eos_token_id=[])
    if name == "plain":
        options |= dict(do_sample=True, key=jax.random.key(1), top_k=20, repetition_penalty=1.3)
    expected = optjax.generate(alone, ids[:rows], mask[:rows], **options)
    found = optjax.generate(spread, ids[:rows], mask[:rows], **options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rules", ["fsdp", "fsdp+tensor+sequence"])
@pytest.mark.parametrize("head", ["sequence_classification", "question_answering", None])
def test_other_heads(head, rules):
    config = OPTConfig(**SIZES, num_labels=3)
    mesh = make_mesh(SPREADS[rules], jax.devices()[:8])
    options = dict(key=jax.random.key(3), head=head)
    alone, spread = optjax.init_params(config, **options), optjax.init_params(config, **options, mesh=mesh, rules=rules)
    ids, mask = data(config)
    function = getattr(optjax, head or "forward")
    for one, many in zip(
        jax.tree.leaves(function(alone, ids, attention_mask=mask)),
        jax.tree.leaves(function(spread, ids, attention_mask=mask)),
        strict=True,
    ):
        real = mask > 0 if one.shape[:2] == mask.shape else slice(None)
        close(np.asarray(many)[real], np.asarray(one)[real])


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "fsdp=2,tensor=4"])
def test_bfloat16_with_one_head_of_one_row_on_a_device(mesh):
    """XLA's CPU backend multiplies no transposed bfloat16 into float32, and so few queries came as a transpose."""
    config = OPTConfig(**SIZES | {"num_attention_heads": 4, "num_hidden_layers": 1})
    alone = optjax.init_params(config.replace(init_std=0.3), jax.random.key(3), "bfloat16")
    spread = optjax.init_params(alone.config, jax.random.key(3), "bfloat16", mesh=make_mesh(mesh, jax.devices()[:8]))
    ids = data(config)[0][:2, :6]
    (expected, logits), grads = _loss_and_gradients(alone, ids, np.ones_like(ids))
    (found, logits8), grads8 = _loss_and_gradients(spread, ids, np.ones_like(ids))
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    for one, many in zip((logits, *jax.tree.leaves(grads)), (logits8, *jax.tree.leaves(grads8)), strict=True):
        np.testing.assert_allclose(np.float32(many), np.float32(one), atol=5e-2 * float(jnp.abs(one).max()) + 1e-3)
    hidden, hidden8 = (optjax.forward(params, ids).last_hidden_state for params in (alone, spread))
    np.testing.assert_allclose(np.float32(hidden8), np.float32(hidden), atol=5e-2 * float(jnp.abs(hidden).max()))
    scores, scores8 = (optjax.score(params, [[2]] * 2, ids.tolist()) for params in (alone, spread))
    for one, many in zip(scores, scores8, strict=True):
        np.testing.assert_allclose(many.logprob, one.logprob, rtol=1e-2)
    assert optjax.generate(spread, ids, max_new_tokens=2, eos_token_id=[]).shape == (2, 8)


def test_flat_cache_over_tensor():
    """The layout of TPUs, where the heads of a device are multiplied as one block."""
    alone, spread = trees(OPTConfig(**SIZES), "tensor", stacked=False)
    ids, mask = data(alone.config)
    step = jax.jit(lambda params, ids, mask, cache: optjax.causal_lm(params, ids, attention_mask=mask, cache=cache))
    outs = []
    for params in (alone, spread):
        out = step(params, ids, mask, optjax.init_cache(params, B, T + 4, layout="flat"))
        logits = [np.asarray(out.logits)[mask > 0]]
        for column in range(3):
            out = step(params, ids[:, column : column + 1], None, out.cache)
            logits.append(np.asarray(out.logits))
        outs.append((logits, out.cache))
    for one, many in zip(outs[0][0], outs[1][0], strict=True):
        close(many, one)
    keys = outs[1][1].keys[0]
    assert keys.sharding.shard_shape(keys.shape) == (B // 2, T + 4, SIZES["hidden_size"] // 4)


@pytest.mark.parametrize("rules", RULES)
def test_bytes_of_a_device_are_the_total_over_the_shards(rules):
    config = OPTConfig(**SIZES)
    mesh = make_mesh(SPREADS[rules], jax.devices()[:8])
    params = optjax.init_params(config, jax.random.key(0), mesh=mesh, rules=rules)
    cache = optjax.init_cache(params, B, 16)
    parts = {axis: int(np.prod([mesh.shape[m] for m in _axes(RULES[rules][axis])])) for axis in RULES[rules]}
    for weight in optjax.declare(config):
        leaf = params.weights
        for step in weight.keys(0 if weight.per_layer else None):
            leaf = leaf[step]
        shards = int(np.prod([parts[axis] for axis in weight.logical]))
        assert {shard.data.nbytes * shards for shard in leaf.addressable_shards} == {leaf.nbytes}, weight.path
    shards = parts["batch"] * parts["heads"]
    for buffer in (*cache.keys, *cache.values):
        assert {shard.data.nbytes * shards for shard in buffer.addressable_shards} == {buffer.nbytes}


def _axes(value):
    return () if value is None else (value,) if isinstance(value, str) else value


def test_stacking_keeps_the_spread():
    _, spread = trees(OPTConfig(**SIZES), "fsdp+tensor", stacked=False)
    stacked = optjax.stack_layers(spread)
    abstract = optjax.abstract_params(spread.config, stacked=True, mesh=spread.placement.mesh, rules="fsdp+tensor")
    assert jax.tree.structure(stacked) == jax.tree.structure(abstract)
    for leaf, want in zip(jax.tree.leaves(stacked), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    back = optjax.unstack_layers(stacked)
    for leaf, want in zip(jax.tree.leaves(back), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(leaf, want)
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    assert jnp.issubdtype(back.dtype, jnp.floating)
