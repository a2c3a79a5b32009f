"""`generate`'s loop: when it ends, what it compiles, and its steps one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from generation_helpers import CONFIG, make_pair, pad, random_prompts

import optjax
from optjax.cache import reorder_cache
from optjax.generation import stages
from optjax.generation.buckets import bucket
from optjax.generation.loop import run_generate
from optjax.generation.settings import as_settings

V = CONFIG.vocab_size


@pytest.fixture(scope="module")
def params():
    return make_pair(CONFIG.replace(num_hidden_layers=2), seed=3)[1]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return random_prompts(rng, 5, V, 10)


def new_tokens(params, ids, mask=None, **options) -> np.ndarray:
    return np.asarray(optjax.generate(params, ids, mask, **options))[:, np.shape(ids)[1] :]


def test_buckets():
    """Never smaller, at most a quarter larger above 64, and few of them."""
    sizes = [bucket(n) for n in range(1, 2049)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n >= 64)
    assert sorted(set(sizes))[:5] == [16, 32, 48, 64, 80] and len(set(sizes)) <= 24
    assert bucket(2048) == 2048


def test_ends_when_every_row_has_ended(params, prompts):
    """The steps that run are those until the last row's end; what follows a row's end is pad."""
    ids, mask = pad(prompts, "left", np.random.default_rng(0), V)
    free = new_tokens(params, ids, mask, max_new_tokens=16, eos_token_id=[])
    extra = ((0, 0), (16 - ids.shape[1], 0))
    padded, mask_bits = np.pad(ids, extra).astype(np.int32), np.pad(mask, extra) != 0
    assert padded.shape[1] == 16

    def run(eos: list[int], limit: int):
        settings = as_settings(params.config, {"eos_token_id": eos})
        made, steps = run_generate(params, padded, mask_bits, settings, None, np.int32(limit), room=16)
        return np.asarray(made.token), int(steps)

    tokens, steps = run([], 16)
    np.testing.assert_array_equal(tokens, free)
    assert steps == 16
    seen = set()
    for at in range(10):
        # Four ends of sequence: what each of four rows says at this step.
        eos = [int(i) for i in free[:4, at]]
        ends = [np.flatnonzero(np.isin(row, eos)) for row in free]
        last = max(int(end[0]) + 1 if len(end) else 16 for end in ends)
        tokens, steps = run(eos, 16)
        assert steps == last
        for row, end, unended in zip(tokens, ends, free, strict=True):
            stop = end[0] + 1 if len(end) else 16
            np.testing.assert_array_equal(row[:stop], unended[:stop])
            assert (row[stop:] == 1).all()
        seen.add(last)
        streamed = list(optjax.stream(params, ids, mask, max_new_tokens=16, eos_token_id=eos))
        assert len(streamed) == last
    assert len(seen) > 2 and min(seen) < 16


def test_max_new_tokens_is_traced(params, prompts):
    """Any number in the bucket: no compilation, and a prefix of the longest."""
    ids, mask = pad(prompts, "holes", np.random.default_rng(0), V)
    longest = new_tokens(params, ids, mask, max_new_tokens=16)
    with count_compilations() as count:
        for n in (1, 2, np.int64(7), 15):
            shorter = new_tokens(params, ids, mask, max_new_tokens=n)
            np.testing.assert_array_equal(shorter, longest[:, :n])
            assert len(list(optjax.stream(params, ids, mask, max_new_tokens=n))) <= n or count
    assert count.compiled <= 2, "the stream's two programs only"


GREEDY = [
    dict(max_new_tokens=9),
    dict(max_new_tokens=16, eos_token_id=7, pad_token_id=0),
    dict(max_new_tokens=1, eos_token_id=[46]),
]
PROCESSED = [
    dict(
        max_new_tokens=n, repetition_penalty=p, no_repeat_ngram_size=2, bad_words_ids=[[a], [a, 3]],
        min_new_tokens=n // 2, suppress_tokens=list(range(a)), eos_token_id=[a, 4], sequence_bias={(a,): p, (2, a): -p},
        encoder_repetition_penalty=p + 1, encoder_no_repeat_ngram_size=3, forced_bos_token_id=a, forced_eos_token_id=a,
        begin_suppress_tokens=[n], exponential_decay_length_penalty=(a, p), remove_invalid_values=True,
    )
    for n, p, a in [(9, 1.2, 5), (16, 0.7, 30), (2, 2, 9)]
]  # fmt: skip
SAMPLED = [
    dict(
        max_new_tokens=n, do_sample=True, temperature=t, top_k=k, top_p=p, min_p=m, typical_p=y, num_return_sequences=2,
        key=jax.random.key(n), epsilon_cutoff=m / 2 + 1e-9, eta_cutoff=p / 2,
    )
    for n, t, k, p, m, y in [(9, 0.7, 50, 0.9, 0.1, 0.9), (16, 5, 1, 0.1, 0, 0.2), (2, 1e-3, 10**9, 0.999, 1, 0.99)]
]  # fmt: skip


@pytest.mark.parametrize("calls", [GREEDY, PROCESSED, SAMPLED], ids=["greedy", "processed", "sampled"])
@pytest.mark.parametrize("function", ["generate", "generate with scores", "stream"])
def test_second_call_compiles_nothing(function, calls, params):
    """Other prompts, lengths, masks, kinds of array and numbers of the same bucket: not even a small program."""
    rng = np.random.default_rng(0)

    def call(ids, mask, options):
        if function == "stream":
            return [np.asarray(step) for step in optjax.stream(params, ids, mask, **options)]
        scores = dict(return_dict_in_generate=True, output_scores=True) if "scores" in function else {}
        return jax.block_until_ready(optjax.generate(params, ids, mask, **options, **scores))

    call(rng.integers(0, V, (3, 8)), None, calls[0])
    prompts = [
        (rng.integers(0, V, (3, 16)), None),
        (rng.integers(0, V, (3, 1)).tolist(), [[1]] * 3),
        (jnp.asarray(rng.integers(0, V, (3, 5))), jnp.asarray(np.tri(3, 5, dtype=bool))),
        (rng.integers(0, V, (3, 11)).astype(np.uint8), rng.integers(0, 2, (3, 11)) | np.eye(3, 11, dtype=int)),
        (jnp.asarray(rng.integers(0, V, (3, 7)), jnp.int8), jnp.asarray(np.tri(3, 7, dtype=np.int16))),
    ]
    with count_compilations() as count:
        for ids, mask in prompts:
            for options in calls:
                call(ids, mask, options)
    assert count.compiled == 0


def test_another_bucket_does_compile(params):
    """What the tests above would see if something were compiled."""
    ids = np.ones((3, 17), int)
    with count_compilations() as count:
        optjax.generate(params, ids, max_new_tokens=3)
    assert count.compiled == 1


def test_decode_step_compiles_once(params, prompts):
    ids, mask = pad(prompts, "left", np.random.default_rng(0), V)
    _, cache = optjax.prefill(params, ids, mask, max_length=30)
    token = np.ones(5, np.int32)
    _, cache = optjax.decode_step(params, token, cache)
    put = jax.device_put(token)
    with count_compilations() as count:
        for each in (token, put, token.astype(np.int64), token.tolist()):
            logits, cache = optjax.decode_step(params, each, cache)
        _, again = optjax.prefill(params, ids[::-1], mask[::-1], max_length=30)
    assert count.compiled == 0
    assert logits.shape == (5, V) and logits.dtype == jnp.float32


def own_loop(params, cache, chunks, new: int) -> np.ndarray:
    """`generate` by hand: greedy, the prompt in chunks of ids and mask."""
    for ids, mask in chunks:
        logits, cache = optjax.prefill(params, ids, mask, cache=cache)
    made = []
    for _ in range(new):
        token = np.asarray(logits).argmax(-1)
        made.append(token)
        logits, cache = optjax.decode_step(params, token, cache)
    return np.stack(made, axis=1)


@pytest.mark.parametrize("layout", ["heads", "flat"])
@pytest.mark.parametrize("rows", [1, 5])
def test_own_loop_equals_generate(layout, rows, params, prompts):
    """prefill, whole or in chunks, and decode_step: the tokens of generate, in both layouts of the cache."""
    rng = np.random.default_rng(0)
    expected = None
    for where in ("left", "right", "holes"):
        ids, mask = pad(prompts[:rows], where, rng, V)
        # the same columns for all three, so that they are one program
        ids, mask = np.pad(ids, ((0, 0), (0, 12 - ids.shape[1]))), np.pad(mask, ((0, 0), (0, 12 - mask.shape[1])))
        if expected is None:
            expected = new_tokens(params, ids, mask, max_new_tokens=9, eos_token_id=[])
        empty = optjax.init_cache(params, rows, 24, layout=layout)
        np.testing.assert_array_equal(own_loop(params, empty, [(ids, mask)], 9), expected)
    # in chunks of 4, of which a row's first may be padding alone
    ids, mask = pad(prompts[:rows], "left", rng, V)
    ids, mask = (np.pad(x, ((0, 0), (12 - x.shape[1], 0))) for x in (ids, mask))
    assert rows == 1 or (mask[:, :4].sum(1) == 0).any()
    chunks = [(ids[:, i : i + 4], mask[:, i : i + 4]) for i in (0, 4, 8)]
    empty = optjax.init_cache(params, rows, 24, layout=layout)
    np.testing.assert_array_equal(own_loop(params, empty, chunks, 9), expected)


def test_prefill_logits_are_those_of_the_last_token(params, prompts):
    rng = np.random.default_rng(1)
    for where in ("left", "right", "holes"):
        ids, mask = pad(prompts, where, rng, V)
        logits, cache = optjax.prefill(params, ids, mask, max_length=ids.shape[1])
        np.testing.assert_array_equal(cache.lengths, mask.sum(1))
        for row, prompt in enumerate(prompts):
            alone = np.asarray(optjax.causal_lm(params, prompt[None]).logits)[0, -1]
            np.testing.assert_allclose(logits[row], alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("layout", ["heads", "flat"])
def test_reorder_cache(layout, params, prompts):
    """Rows picked, repeated, down to one and up from one."""
    ids, mask = pad(prompts, "left", np.random.default_rng(0), V)
    logits, cache = optjax.prefill(params, ids, mask, cache=optjax.init_cache(params, 5, 12, layout=layout))
    token = np.asarray(logits).argmax(-1)
    for rows in ([4, 4, 0], [2], [0, 1, 2, 3, 4]):
        picked = reorder_cache(cache, np.array(rows))
        assert picked.batch_size == len(rows)
        again = reorder_cache(picked, np.zeros(2, int))
        step, _ = optjax.decode_step(params, token[rows], picked)
        repeated, _ = optjax.decode_step(params, token[[rows[0]] * 2], again)
        np.testing.assert_allclose(repeated[0], step[0], atol=1e-4)
        for row, logits_of_row in zip(rows, step, strict=True):
            prompt = np.append(prompts[row], token[row])
            alone = np.asarray(optjax.causal_lm(params, prompt[None]).logits)[0, -1]
            np.testing.assert_allclose(logits_of_row, alone, atol=1e-5 * np.abs(alone).max())


def test_the_prompt_is_computed_once(params):
    """No hidden state of the prompt has a row for each sample."""
    settings = as_settings(params.config, dict(do_sample=True, num_return_sequences=5))
    arguments = (np.zeros((3, 16), np.int32), np.ones((3, 16), bool), settings, jax.random.key(0), np.int32(4))
    text = str(jax.make_jaxpr(lambda *a: run_generate(*a, room=16))(params, *arguments))
    assert "f32[3,16,32]" in text and "f32[15,1,32]" in text
    assert "f32[15,16," not in text


def test_inside_jit(params, prompts):
    """generate as a part of somebody's program: of ids and mask, of params, and of keys under vmap."""
    ids, mask = pad(prompts, "right", np.random.default_rng(0), V)
    expected = np.asarray(optjax.generate(params, ids, mask, max_new_tokens=6, eos_token_id=[3, 9]))
    options = dict(max_new_tokens=6, eos_token_id=[3, 9])
    for out in (
        jax.jit(lambda p, i, m: optjax.generate(p, i, m, **options))(params, ids, mask),
        jax.jit(lambda p: optjax.generate(p, ids, mask, **options))(params),
    ):
        np.testing.assert_array_equal(out, expected)
    whole = jax.jit(lambda i: optjax.generate(params, i, return_dict_in_generate=True, **options))(ids)
    plain = optjax.generate(params, ids, return_dict_in_generate=True, **options)
    np.testing.assert_array_equal(whole.sequences, plain.sequences)
    np.testing.assert_allclose(whole.logprobs, plain.logprobs, atol=1e-5)

    def sample(key):
        return optjax.generate(params, ids, mask, do_sample=True, temperature=2.0, key=key, **options)

    keys = jax.random.split(jax.random.key(0), 3)
    many = np.asarray(jax.vmap(sample)(keys))
    np.testing.assert_array_equal(many, np.stack([sample(key) for key in keys]))
    assert (many[0] != many[1]).any()


def test_stacked_layers(params, prompts):
    ids, mask = pad(prompts, "left", np.random.default_rng(0), V)
    expected = optjax.generate(params, ids, mask, max_new_tokens=8)
    np.testing.assert_array_equal(optjax.generate(optjax.stack_layers(params), ids, mask, max_new_tokens=8), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype, params, prompts):
    """Scores in float32; each token within rounding of the best of an uncached forward pass; streaming the same."""
    half = jax.tree.map(lambda w: w.astype(dtype), params)
    ids, mask = pad(prompts, "left", np.random.default_rng(0), V)
    out = optjax.generate(half, ids, mask, max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    new = np.asarray(out.sequences)[:, ids.shape[1] :]
    assert out.scores.dtype == jnp.float32 and np.isfinite(out.logprobs).all()
    full = np.concatenate([mask, np.ones_like(new)], axis=1)
    logits = np.asarray(optjax.causal_lm(half, np.asarray(out.sequences), attention_mask=full).logits)
    logits = logits[:, ids.shape[1] - 1 : -1]
    ended = np.cumsum(new == 2, axis=1) - (new == 2) > 0
    chosen = np.take_along_axis(logits, new[..., None], axis=-1)[..., 0]
    assert (logits.max(-1) - chosen)[~ended].max() < 0.05 * np.abs(logits).max()
    streamed = np.stack(list(optjax.stream(half, ids, mask, max_new_tokens=8)), axis=1)
    np.testing.assert_array_equal(streamed, new[:, : streamed.shape[1]])


@pytest.mark.parametrize(
    "rows, options",
    [
        (1, dict(cache_dtype="int8", eos_token_id=[])),
        (3, dict(do_sample=True, num_return_sequences=2, key=jax.random.key(1), eos_token_id=[4])),
        (3, dict(penalty_alpha=0.6, top_k=3, eos_token_id=[])),
        (2, dict(guidance_scale=1.5, negative_prompt_ids=np.arange(40).reshape(2, 20), eos_token_id=[])),
    ],
    ids=["greedy", "drawn", "contrastive", "guided"],
)
def test_a_cache_that_grows_says_the_same(rows, options, params, monkeypatch):
    """In two stages, with a prompt after a prefix; then in one."""
    ids = np.random.default_rng(rows).integers(0, V, (rows, 3))
    prefix = optjax.read_prefix(params, np.arange(5)[None], cache_dtype=options.get("cache_dtype"))
    made = []
    for columns, sizes in ((20, [40, 80]), (512, [80])):
        monkeypatch.setattr(stages, "COLUMNS", columns)
        monkeypatch.setattr(stages, "STEPS", 4)
        assert stages.stages(params, 33, 80) == sizes
        jax.clear_caches()
        made.append(new_tokens(params, ids, max_new_tokens=40, prefix=prefix, **options))
    np.testing.assert_array_equal(*made)
