"""Attention by kernels, interpreted on the CPU: as transformers and as the plain path have it."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import assert_close, padded_masks, params_from, random_config, state_of, torch_model

import optjax
from optjax.kernels import choice, triton
from optjax.kernels.choice import interpreted
from optjax.kernels.flash import Flash
from optjax.placed import compute_capability
from optjax.sharding import make_mesh

# No multiple of a block.
ROWS, LENGTH, ROOM = 3, 21, 9

both = pytest.mark.parametrize("on", ["tpu", "gpu"])


def model(seed: int, head: str | None = "causal_lm", **changes):
    rng = np.random.default_rng(seed)
    config = random_config(rng).replace(max_position_embeddings=LENGTH + ROOM, **changes)
    theirs = torch_model(config, head, seed)
    ids = rng.integers(2, config.vocab_size, size=(ROWS, LENGTH))
    return params_from(state_of(theirs), config, head), theirs, ids, padded_masks(rng, ROWS, LENGTH)


@both
def test_logits(on):
    params, theirs, ids, mask = model(0)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy()
    with interpreted(on):
        found = optjax.causal_lm(params, ids, attention_mask=mask, attn_implementation="flash").logits
    assert_close(found, expected, mask)


@pytest.mark.parametrize(("on", "padded"), [("tpu", True), ("tpu", False), ("gpu", True)])
def test_loss_and_gradients(on, padded):
    params, _, ids, mask = model(1, num_hidden_layers=1)
    mask = mask if padded else None
    labels = ids.copy()
    if mask is not None:
        labels[mask == 0] = -100
        if on == "gpu":
            labels[:, 1:][mask[:, :-1] == 0] = -100  # what padding says of the next token differs

    def loss(params, kind):
        return optjax.causal_lm(params, ids, labels=labels, attention_mask=mask, attn_implementation=kind).loss

    plain = jax.value_and_grad(loss)(params, "eager")
    with interpreted(on):
        found = jax.value_and_grad(loss)(params, "flash")
    together = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(pair)]) for pair in (found, plain))
    assert_close(*together)


@both
def test_generate_says_what_eager_says(on):
    """Prompts are read by a kernel, into a cache that decoding then reads by the plain path."""
    params, _, ids, mask = model(2, num_hidden_layers=1)
    options = dict(attention_mask=mask, max_new_tokens=4, eos_token_id=[])
    expected = optjax.generate(params, ids, **options, attn_implementation="eager")
    with interpreted(on):
        found = optjax.generate(params, ids, **options, attn_implementation="flash")
    np.testing.assert_array_equal(found, expected)


def test_a_prompt_is_read_on_over_a_cache():
    """By the TPU's kernel, with padding in what was read and in what is read; also in chunks of one program."""
    params, _, ids, mask = model(3, num_hidden_layers=1)
    mask[:, 9] = 1  # a real token in the first part of each row
    first, rest = (ids[:, :10], mask[:, :10]), (ids[:, 10:], mask[:, 10:])

    def in_two(kind):
        _, cache = optjax.prefill(params, *first, max_length=LENGTH, attn_implementation=kind)
        return optjax.prefill(params, *rest, cache=cache, attn_implementation=kind)[0]

    expected = in_two("eager")
    options = dict(max_length=LENGTH, prefill_chunk_size=8, attn_implementation="flash")
    with interpreted("tpu"):
        found = in_two("flash")
        in_chunks, _ = optjax.prefill(params, ids, mask, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(in_chunks, expected, rtol=1e-4, atol=1e-4)


@both
def test_on_a_mesh_each_device_has_its_rows_and_heads(on):
    config = optjax.OPTConfig(
        vocab_size=32, hidden_size=320, num_hidden_layers=1, num_attention_heads=4, ffn_dim=16, word_embed_proj_dim=320,
        max_position_embeddings=140,
    )  # fmt: skip
    params = optjax.init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, 32, size=(2, 130)), np.arange(130) >= np.array([[0], [37]])
    expected = optjax.causal_lm(params, ids, attention_mask=mask, attn_implementation="eager").logits
    spread = optjax.init_params(config, jax.random.key(0), mesh=make_mesh("data=2,tensor=2", jax.devices()[:4]))
    with interpreted(on):
        found = optjax.causal_lm(spread, ids, attention_mask=mask, attn_implementation="flash").logits
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(expected)[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block"),
    [("float32", 64, 64), ("float32", 80, 32), ("float32", 128, 32), ("bfloat16", 128, 64), ("float16", 80, 64)],
)
def test_blocks_fit_into_the_smaller_gpus(monkeypatch, dtype, head_dim, block):
    """Of 4 bytes and 80 dimensions blocks of 64 would take 112 KB of a core's memory: an L4 or 3090 has 99."""
    blocks = []
    monkeypatch.setattr(triton, "attend", lambda q, *_, block, interpret: blocks.append(block) or q)
    q, kv = (jnp.zeros(shape, dtype) for shape in ((1, 320, 2, head_dim), (1, 2, 320, head_dim)))
    with interpreted("gpu"):
        Flash(None)(q, kv, kv)
    assert blocks == [block]


def test_what_is_chosen():
    params, _, _, _ = model(4)

    def kind(queries=300, params=params, **options):
        return optjax.attention_kind(params, ROWS, queries, **options)

    assert kind() == "eager"  # on the CPU
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with interpreted("tpu"):
        assert kind() == "flash" and kind(cache=True) == "flash"
        assert kind(255) == "eager" and kind(255, attn_implementation="flash") == "flash"
        assert kind(attn_implementation="eager") == "eager"
        assert kind(cache_dtype="int8") == "eager"
    with interpreted("gpu"):
        assert kind() == "eager"  # float32 may be rounded
        assert kind(params=half) == "flash" and kind(params=half, cache=True) == "eager"
        with jax.enable_x64(True):
            assert kind(params=half) == "eager"


@pytest.mark.parametrize(
    ("capability", "chosen"), [("7.0", "eager"), ("7.5", "eager"), ("8.0", "flash"), ("12.0", "flash")]
)
def test_an_old_gpu_has_no_kernels(monkeypatch, capability, chosen):
    """XLA refuses Triton kernels on a T4 or V100."""
    params, _, _, _ = model(4)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(choice, "platform", lambda placement: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert optjax.attention_kind(half, ROWS, 300) == chosen
    assert optjax.attention_kind(half, ROWS, 1, cache=True) == chosen
    if chosen == "eager":
        with pytest.raises(ValueError, match=f"need compute capability 8.0 or more, .* of {capability}"):
            optjax.attention_kind(half, ROWS, 300, attn_implementation="flash")


def test_the_compute_capability_is_that_of_the_params():
    def placed_on(**attributes):
        return SimpleNamespace(mesh=SimpleNamespace(devices=np.array([SimpleNamespace(**attributes)])))

    assert compute_capability(placed_on(compute_capability="8.9")) == 8.9
    assert compute_capability(placed_on(compute_capability="gfx942")) is None
    assert compute_capability(placed_on()) is compute_capability(None) is None


def test_flash_is_refused_where_it_cannot_be_had():
    params, _, ids, mask = model(5, attention_dropout=0.1)

    def refused(words, function, *arguments, **options):
        with pytest.raises(ValueError, match=words):
            function(params, *arguments, **options, attn_implementation="flash")

    refused("on CPU", optjax.forward, ids)
    refused("on CPU", optjax.generate, ids, max_new_tokens=2)
    refused("on CPU", optjax.score, [[2, 3]])
    with pytest.raises(ValueError, match="one of auto, eager, flash, not 'sdpa'"):
        optjax.forward(params, ids, attn_implementation="sdpa")
    with interpreted("tpu"):
        refused("output_attentions", optjax.forward, ids, output_attentions=True)
        refused("head_mask", optjax.forward, ids, head_mask=np.ones(params.config.num_attention_heads))
        refused("attention_dropout is 0.1", optjax.forward, ids, dropout_key=jax.random.key(0))
        refused("int8", optjax.prefill, ids, mask, max_length=LENGTH, cache_dtype="int8")
        refused("int8", optjax.generate, ids, max_new_tokens=2, cache_dtype="int8")
    with interpreted("gpu"):
        refused(
            "many tokens over a cache that has a past", optjax.generate, ids, max_new_tokens=2, prefill_chunk_size=8
        )
        with jax.enable_x64(True):
            refused("jax_enable_x64", optjax.forward, ids)
