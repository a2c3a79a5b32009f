"""Steps by the kernels that read a cache for few tokens, interpreted on the CPU, and when they are chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import padded_masks, params_from, random_config, state_of, torch_model

import optjax
from optjax.generation import prompt, speculative
from optjax.kernels import choice, decode_gpu, decode_tpu
from optjax.kernels.choice import MANY_COLUMNS, good_columns, interpreted
from optjax.sharding import make_mesh


def model(seed: int):
    rng = np.random.default_rng(seed)
    config = random_config(rng).replace(max_position_embeddings=48, num_hidden_layers=2)
    theirs = torch_model(config, "causal_lm", seed)
    ids = rng.integers(4, config.vocab_size, size=(3, 11))
    return params_from(state_of(theirs), config, "causal_lm"), theirs, ids, padded_masks(rng, 3, 11)


@pytest.fixture(params=["tpu", "gpu"])
def kernel(request, monkeypatch):
    """As on a TPU or GPU with a long cache, in the layout and the columns of the kernel; what it is called with."""
    on, module = request.param, {"tpu": decode_tpu, "gpu": decode_gpu}[request.param]
    monkeypatch.setattr(optjax.cache, "default_layout", lambda _: "flat" if on == "tpu" else "heads")
    monkeypatch.setattr(choice, "MANY_COLUMNS", 1)
    calls = []
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda q, *rest, **options: calls.append(q) or attend(q, *rest, **options))
    with interpreted(on):
        yield calls


STRATEGIES = {
    "greedy": {},
    "int8 cache": {"cache_dtype": "int8"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_generate(kernel, name):
    params, _, ids, mask = model(3)
    options = {"attention_mask": mask, "max_new_tokens": 9, "eos_token_id": [3]} | STRATEGIES[name]
    found = optjax.generate(params, ids, **options)
    assert kernel
    kernel.clear()
    np.testing.assert_array_equal(found, optjax.generate(params, ids, **options, attn_implementation="eager"))
    assert not kernel


def test_generate_as_transformers(kernel):
    params, theirs, ids, mask = model(4)
    mask = np.sort(mask, axis=1)  # padded on the left, as transformers takes them
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    with torch.no_grad():
        expected = theirs.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options).numpy()
    found = optjax.generate(params, ids, attention_mask=mask, max_new_tokens=12, eos_token_id=[])
    np.testing.assert_array_equal(found, expected)
    assert kernel


def test_decode_step(kernel, caplog):
    """A token in each row after prompts padded on the right, whose padding is never looked at."""
    params, theirs, ids, mask = model(5)
    mask = np.sort(mask, axis=1)[:, ::-1].copy()
    new = np.array([5, 6, 7])
    logits = {}
    for kind in ("eager", "flash"):
        _, cache = optjax.prefill(params, ids, mask, max_length=16)
        caplog.set_level("INFO", "optjax.model")
        logits[kind], cache = optjax.decode_step(params, new, cache, attn_implementation=kind)
        assert (kind == "flash") == bool(kernel)
        assert caplog.messages[-1] == f"attention of 1 tokens in each of 3 rows: {kind}"
    np.testing.assert_allclose(logits["flash"], logits["eager"], rtol=1e-4, atol=1e-4)
    whole, all_real = np.concatenate([ids, new[:, None]], 1), np.concatenate([mask, np.ones((3, 1), mask.dtype)], 1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(whole), torch.from_numpy(all_real)).logits[:, -1].numpy()
    np.testing.assert_allclose(logits["flash"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_gradients_are_those_of_the_plain_path(kernel, dtype):
    """Of a step's logits, with respect to what it is given and to the weights."""
    params, _, ids, mask = model(8)
    embeds = jax.random.normal(jax.random.key(0), (3, 2, params.config.embed_dim))

    def loss(params, embeds, kind):
        cache = optjax.init_cache(params, 3, 16, dtype)
        cache = optjax.causal_lm(params, ids, attention_mask=mask, cache=cache, attn_implementation="eager").cache
        out = optjax.causal_lm(params, inputs_embeds=embeds, cache=cache, attn_implementation=kind)
        return jnp.square(out.logits).mean()

    found, expected = (jax.grad(loss, argnums=(0, 1))(params, embeds, kind) for kind in ("auto", "eager"))
    assert kernel
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-6)


def test_on_a_mesh_each_device_has_its_rows_and_heads(kernel):
    config = optjax.OPTConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=16, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, 32, size=(2, 9)), np.arange(9) >= np.array([[0], [4]])
    options = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": []}
    expected = optjax.generate(optjax.init_params(config, jax.random.key(0)), ids, **options)
    mesh = make_mesh("data=2,tensor=2", jax.devices()[:4])
    kernel.clear()
    spread = optjax.init_params(config, jax.random.key(0), mesh=mesh)
    for dtype in (None, "int8"):
        found = optjax.generate(spread, ids, cache_dtype=dtype, **options)
        np.testing.assert_array_equal(found, expected)
    assert {(q.shape[0], q.shape[1], q.size) for q in kernel} == {(1, 1, 16)}


def test_few_tokens_after_an_int8_prefix(monkeypatch):
    """What "auto" is gets settled by the columns there are in the end, which may be none that a kernel reads."""
    monkeypatch.setattr(optjax.cache, "default_layout", lambda _: "flat")
    params, _, ids, _ = model(9)
    rows = ids[:, :2]

    def results(kind):
        prefix = optjax.read_prefix(params, ids[:1], cache_dtype="int8")
        scores = optjax.score(
            params, list(map(list, rows)), prefix=prefix, prefill_chunk_size=2, attn_implementation=kind
        )
        logits = [
            optjax.prefill(params, rows, max_length=n, prefix=prefix, attn_implementation=kind)[0] for n in (112, 150)
        ]
        return [*logits, *(each.token_logprobs for each in scores)]

    plain = results("eager")
    with interpreted("tpu"):
        for few in (1, 512):
            monkeypatch.setattr(choice, "MANY_COLUMNS", few)
            for found, expected in zip(results("auto"), plain, strict=True):
                np.testing.assert_allclose(np.float64(found), np.float64(expected), rtol=1e-4, atol=1e-4)


def test_what_is_chosen():
    params, _, ids, mask = model(6)
    config = params.config

    def kind(queries=1, columns=512, layout="flat", dtype=None, **options):
        cache = jax.eval_shape(lambda: optjax.init_cache(config, 3, columns, dtype, layout=layout))
        return optjax.attention_kind(params, 3, queries, cache=cache, **options)

    assert kind() == "eager"  # on the CPU
    with interpreted("gpu"):
        assert kind(layout="flat") == "eager"
        assert kind(layout="heads") == kind(8, layout="heads") == kind(columns=513, layout="heads") == "flash"
        assert kind(dtype="int8", layout="heads") == kind(dtype="float16", layout="heads") == "flash"
        assert optjax.attention_kind(params, 3, 1, cache=True) == "flash"
        assert kind(9, layout="heads") == kind(columns=511, layout="heads") == "eager"
        assert kind(columns=511, layout="heads", attn_implementation="flash") == "flash"
        assert kind(layout="heads", attn_implementation="eager") == "eager"
        wider = optjax.abstract_params(config.replace(hidden_size=config.num_attention_heads * 136))
        assert optjax.attention_kind(wider, 3, 1, cache=True) == "eager"
    with interpreted("tpu"):
        assert kind() == kind(8) == kind(dtype="int8") == kind(columns=2048) == "flash"
        assert optjax.attention_kind(params, 3, 1, cache=True) == "flash"
        assert kind(9) == kind(layout="heads") == kind(columns=513) == kind(columns=384) == "eager"
        assert kind(dtype="float16") == "eager"  # the compiler has no way from it to another dtype
        assert kind(columns=384, attn_implementation="flash") == "flash"
        assert kind(attn_implementation="eager") == "eager"
        assert kind(columns=513, attn_implementation="flash") == "flash"  # by the kernel for many queries
    wide = optjax.abstract_params(optjax.OPTConfig.preset("opt-175b"), "bfloat16")
    with interpreted("tpu"):
        assert optjax.attention_kind(wide, 1, 1, cache=True) == "eager"  # a block of 96 heads does not fit


@pytest.mark.parametrize(
    ("size", "tokens", "dtype", "cache_dtype", "fits"),
    [
        ("13b", 1, "bfloat16", "bfloat16", True),
        ("13b", 4, "bfloat16", "bfloat16", True),
        ("13b", 8, "bfloat16", "bfloat16", False),
        ("13b", 1, "float32", "float32", True),
        ("30b", 1, "bfloat16", "bfloat16", True),
        ("30b", 1, "bfloat16", "float32", False),  # 16.4 of 16 MiB, as the compiler has it
        ("30b", 1, "bfloat16", "int8", True),
        ("66b", 1, "bfloat16", "bfloat16", False),
    ],
)
def test_what_fits_into_a_core(size, tokens, dtype, cache_dtype, fits):
    """Those that do have been compiled for a v5e."""
    config = optjax.OPTConfig.preset(f"opt-{size}", num_hidden_layers=1)
    params = optjax.abstract_params(config, dtype)
    cache = jax.eval_shape(lambda: optjax.init_cache(config, 2, 2048, cache_dtype, layout="flat"))
    with interpreted("tpu"):
        assert optjax.attention_kind(params, 2, tokens, cache=cache) == ("flash" if fits else "eager")


def test_columns_are_those_of_blocks(monkeypatch):
    """Whatever is asked for: `generate` makes the cache as the kernel can read it."""
    params, _, ids, mask = model(7)
    seen = []
    own_cache = prompt.own_cache
    for module in (prompt, speculative):
        monkeypatch.setattr(module, "own_cache", lambda *sizes: seen.append(sizes[2]) or own_cache(*sizes))
    monkeypatch.setattr(choice, "MANY_COLUMNS", 16)
    with interpreted("tpu"):
        optjax.generate(params, ids, attention_mask=mask, max_new_tokens=3)
        assert seen == [128]
        optjax.generate(params, ids, attention_mask=mask, max_new_tokens=3, assistant_model=params)
    assert seen == [128] * 3


@pytest.mark.parametrize(
    ("on", "columns", "name", "wanted"),
    [
        ("tpu", 700, "auto", 768),
        ("tpu", 700, "flash", 768),
        ("tpu", 768, "auto", 768),
        ("tpu", 700, "eager", 700),
        ("tpu", MANY_COLUMNS - 1, "auto", MANY_COLUMNS - 1),
        ("gpu", 700, "auto", 704),
        ("gpu", 17, "eager", 24),
        ("gpu", 704, "auto", 704),
        ("cpu", 700, "auto", 700),
    ],
)
def test_columns_are_rounded_for_the_kernel_and_for_tensor_cores(monkeypatch, on, columns, name, wanted):
    monkeypatch.setattr(choice, "kernel_platform", lambda placement: on)
    assert good_columns(None, columns, name) == wanted
