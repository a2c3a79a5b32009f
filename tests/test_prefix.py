"""A prefix that was read before, and prompts read in chunks: the ids are those of the whole prompt read at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import AS_USERS_DO, count_compilations
from generation_helpers import CONFIG, assert_same_tokens, hf_generate, make_pair, pad, random_prompts
from hf_models import assert_close

import optjax
from optjax.sharding import make_mesh

V, N = CONFIG.vocab_size, 10
MODEL = CONFIG.replace(word_embed_proj_dim=20)
SMALLER = CONFIG.replace(hidden_size=16, num_attention_heads=2)
SYSTEM = np.random.default_rng(7).integers(0, V, size=21)
EVERY_PROCESSOR = dict(
    repetition_penalty=1.3, encoder_repetition_penalty=1.1, no_repeat_ngram_size=3, encoder_no_repeat_ngram_size=4,
    min_length=26, bad_words_ids=[[5], [int(SYSTEM[-1]), 3]],
)  # fmt: skip
WAYS = {
    "greedy": EVERY_PROCESSOR,
    "drawn": dict(do_sample=True, top_p=0.9, num_return_sequences=2, cache_dtype="int8"),
    "beams": dict(num_beams=3, num_return_sequences=2, repetition_penalty=1.2, cache_dtype="int8"),
    "contrastive": dict(penalty_alpha=0.6, top_k=4, cache_dtype="int8"),
    "assistant": dict(num_assistant_tokens=3),
    "prompt lookup": dict(prompt_lookup_num_tokens=4, cache_dtype="int8"),
    "negative prompt": dict(guidance_scale=1.5, negative_prompt_ids=np.arange(120).reshape(4, 30) % V),
}


@pytest.fixture(scope="module")
def pair():
    return make_pair(MODEL, seed=3)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(np.random.default_rng(1), 4, V, 12)


def padded(prompts, where="holes"):
    return pad(prompts, where, np.random.default_rng(2), V)


def after(prompts) -> list[np.ndarray]:
    """The prompts with what the prefix says before them."""
    return [np.concatenate([SYSTEM, prompt]) for prompt in prompts]


def new_tokens(params, prompts, where="holes", **options) -> np.ndarray:
    ids, mask = padded(prompts, where)
    if options.get("do_sample"):
        options["key"] = jax.random.key(5)
    if "num_assistant_tokens" in options:
        options["assistant_model"] = make_pair(SMALLER, seed=4)[1]
    return np.asarray(optjax.generate(params, ids, mask, max_new_tokens=N, **options))[:, ids.shape[1] :]


def test_as_transformers_continue_the_whole(pair, prompts):
    model, params = pair
    whole = hf_generate(model, after(prompts), N, **(options := dict(eos_token_id=[3, 40], repetition_penalty=1.3)))
    prefix = optjax.read_prefix(params, SYSTEM[None], prefill_chunk_size=8)
    for where in ("left", "right", "holes"):
        assert_same_tokens(new_tokens(params, prompts, where, prefix=prefix, **options), whole)
    ids, mask = padded(prompts)
    steps = list(optjax.stream(params, ids, mask, max_new_tokens=N, prefix=prefix, **options))
    steps += [np.ones(4, np.int32)] * (N - len(steps))
    assert_same_tokens(np.stack(steps, 1), whole)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding(pair, prompts, way):
    """After the prefix and in chunks as without either; processors see the prefix."""
    params, options = pair[1], WAYS[way]
    whole = new_tokens(params, after(prompts), **options)
    prefix = optjax.read_prefix(params, SYSTEM[None], cache_dtype=options.get("cache_dtype"))
    made = new_tokens(params, prompts, prefix=prefix, prefill_chunk_size=5, **options)
    np.testing.assert_array_equal(made, whole)


def test_a_prefix_for_each_row(pair, prompts):
    """Rows of their own, padded anywhere; and one row alone."""
    params = pair[1]
    beginnings = random_prompts(np.random.default_rng(4), 4, V, 20)
    whole = new_tokens(params, [np.concatenate(both) for both in zip(beginnings, prompts, strict=True)])
    prefix = optjax.read_prefix(params, *padded(beginnings))
    np.testing.assert_array_equal(new_tokens(params, prompts, prefix=prefix), whole)
    one = optjax.read_prefix(params, beginnings[2][None])
    np.testing.assert_array_equal(new_tokens(params, prompts[2:3], prefix=one), whole[2:3])


def test_on_a_mesh_and_inside_jit(prompts):
    config = MODEL.replace(vocab_size=48, init_std=0.3)
    params = optjax.init_params(config, jax.random.key(1))
    alone = new_tokens(params, after(prompts), cache_dtype="int8")
    spread = optjax.init_params(config, jax.random.key(1), mesh=make_mesh("data=2,tensor=2", jax.devices()[:4]))
    prefix = optjax.read_prefix(spread, SYSTEM[None], cache_dtype="int8")
    np.testing.assert_array_equal(new_tokens(spread, prompts, prefix=prefix, prefill_chunk_size=8), alone)

    @jax.jit
    def inside(params, system, ids, mask):
        prefix = optjax.read_prefix(params, system, cache_dtype="int8")
        return optjax.generate(params, ids, mask, max_new_tokens=N, prefix=prefix, prefill_chunk_size=4)

    ids, mask = padded(prompts)
    np.testing.assert_array_equal(inside(params, SYSTEM[None], ids, mask)[:, ids.shape[1] :], alone)


def test_another_prefix_and_prompt_compile_nothing(pair, prompts):
    """Of the same buckets; and a prefix stays what it is."""
    params = pair[1]
    prefix = optjax.read_prefix(params, SYSTEM[None], prefill_chunk_size=8)
    first = new_tokens(params, prompts, prefix=prefix, prefill_chunk_size=8)
    with count_compilations() as count:
        other = optjax.read_prefix(params, SYSTEM[None, :-3], prefill_chunk_size=8)
        new_tokens(params, prompts[::-1], prefix=other, prefill_chunk_size=8)
    assert count.compiled == 0
    np.testing.assert_array_equal(new_tokens(params, prompts, prefix=prefix, prefill_chunk_size=8), first)


def test_prefill(pair, prompts):
    """Logits after a prefix, in chunks that divide the prompt and that do not, and those of the tokens after them."""
    params = pair[1]
    # Columns before all real tokens, some of a chunk among them.
    ids, mask = (np.pad(x, ((0, 0), (7, 0))) for x in padded(prompts))

    def last_logits(texts: list[np.ndarray]) -> np.ndarray:
        texts, their_mask = padded([*texts, np.zeros(len(SYSTEM) + 14, int)], "left")
        return np.asarray(optjax.causal_lm(params, texts, attention_mask=their_mask).logits[:-1, -1])

    prefix, expected = optjax.read_prefix(params, SYSTEM[None]), last_logits(after(prompts))
    for size in (None, 4, 5):
        logits, cache = optjax.prefill(params, ids, mask, max_length=24, prefix=prefix, prefill_chunk_size=size)
        assert_close(logits, expected)
        assert cache.max_length == prefix.columns + 24
    logits, _ = optjax.decode_step(params, np.full(4, 5), cache)
    assert_close(logits, last_logits([np.concatenate([text, [5]]) for text in after(prompts)]))
    chunked, _ = optjax.prefill(params, ids, mask, max_length=24, prefill_chunk_size=3)
    assert_close(chunked, last_logits(prompts))


def test_score(pair, prompts):
    """After a prefix the first token has a log-probability, too; all of them are those of the whole text."""
    params = pair[1]
    whole = optjax.score(params, [SYSTEM] * 4, prompts, top_logprobs=3)
    prefix = optjax.read_prefix(params, SYSTEM[None])
    for made in (
        optjax.score(params, prompts, top_logprobs=3, prefix=prefix),
        optjax.score(params, [[]] * 4, prompts, top_logprobs=3, prefix=prefix, batch_size=3, prefill_chunk_size=5),
    ):
        for ours, theirs in zip(made, whole, strict=True):
            np.testing.assert_array_equal(ours.top_ids, theirs.top_ids)
            assert_close(ours.token_logprobs, theirs.token_logprobs)
            assert ours.is_greedy == theirs.is_greedy
    texts = after(prompts)
    chunked, plain = optjax.score(params, texts, prefill_chunk_size=7), optjax.score(params, texts)
    for ours, theirs in zip(chunked, plain, strict=True):
        assert_close(ours.token_logprobs[1:], theirs.token_logprobs[1:])


def test_what_does_not_fit(pair):
    params = pair[1]
    prefix = optjax.read_prefix(params, np.ones((2, 40), int))
    ids = np.ones((2, 10), int)
    for what, wrong in {
        "of 50 tokens, its prefix included, and max_new_tokens = 20": dict(max_new_tokens=20, prefix=prefix),
        "should come from read_prefix, got Cache": dict(max_new_tokens=2, prefix=prefix.cache),
        "prefill_chunk_size should be an integer of at least 1": dict(max_new_tokens=2, prefill_chunk_size=0),
        "floating dtype such as jnp.bfloat16, or of int8, not 'int4'": dict(max_new_tokens=2, cache_dtype="int4"),
        "is not that of the prefix, float32": dict(max_new_tokens=2, cache_dtype="int8", prefix=prefix),
    }.items():
        with pytest.raises(ValueError, match=what):
            optjax.generate(params, ids, **wrong)
    with pytest.raises(ValueError, match="prefix has 2 rows, and ids have 3"):
        optjax.generate(params, np.ones((3, 4), int), max_new_tokens=2, prefix=prefix)
    with pytest.raises(ValueError, match="model of another shape"):
        optjax.generate(make_pair(SMALLER)[1], ids, max_new_tokens=2, prefix=prefix)
    for change in ({"num_attention_heads": 1}, {"num_hidden_layers": params.config.num_hidden_layers + 1}):
        other = optjax.init_params(params.config.replace(**change), jax.random.key(0))
        with pytest.raises(ValueError, match="model of another shape"):
            optjax.score(other, [[1]] * 2, prefix=prefix)
    smaller = optjax.init_params(params.config.replace(vocab_size=9), jax.random.key(0))
    with pytest.raises(ValueError, match=r"the prefix's ids.* is 10, outside the vocabulary: 0 to 8"):
        optjax.generate(smaller, [[1]], max_new_tokens=2, prefix=optjax.read_prefix(params, [[3, 10]]))
    with pytest.raises(ValueError, match="65 tokens in a row, its prefix included"):
        optjax.prefill(params, np.ones((2, 25), int), max_length=30, prefix=prefix)
    with pytest.raises(ValueError, match="of a new cache"):
        optjax.prefill(params, ids, cache=optjax.init_cache(params, 2, 20), prefix=prefix)
    with pytest.raises(ValueError, match="prefix has 2 rows"):
        optjax.score(params, [[1]], prefix=prefix)
    with pytest.raises(ValueError, match="after a prefix of 40"):
        optjax.score(params, [[1] * 30], prefix=optjax.read_prefix(params, np.ones((1, 40), int)))
    with pytest.raises(ValueError, match="attention_mask is all 0 in row 1"):
        optjax.read_prefix(params, ids, np.arange(2)[::-1, None] * np.ones((1, 10), int))
    with pytest.raises(ValueError, match="65 tokens in a row"):
        optjax.read_prefix(params, np.ones((1, 65), int))


def test_a_chunk_is_all_that_a_long_prompt_takes():
    """Temporary memory grows with the chunk, not with the prompt; and the loop over chunks copies no cache."""
    config = optjax.OPTConfig.preset("opt-125m", num_hidden_layers=2, vocab_size=512)
    from optjax.generation.decode import _prefill

    def compiled(t: int, size: int | None):
        cache = jax.eval_shape(lambda: optjax.init_cache(config, 2, 2048))
        ids = jax.ShapeDtypeStruct((2, t), jnp.int32)
        mask = jax.ShapeDtypeStruct((2, t), jnp.bool_)
        lowered = _prefill.lower(optjax.abstract_params(config), ids, mask, cache, size)
        return lowered.compile(compiler_options=AS_USERS_DO).memory_analysis()

    whole, chunks = compiled(1792, None), compiled(1792, 128)
    states = 2 * 1792 * 768 * 4
    assert chunks.alias_size_in_bytes >= 2 * 2 * 2 * 2048 * 768 * 4
    assert chunks.temp_size_in_bytes < whole.temp_size_in_bytes / 3
    assert chunks.temp_size_in_bytes < states + 1.3 * compiled(128, None).temp_size_in_bytes
