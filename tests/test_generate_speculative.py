"""Guessed tokens, by a smaller model or by prompt lookup: the ids of plain greedy decoding, the distribution of plain
sampling, and fewer passes of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compilations import count_compilations
from generation_helpers import CONFIG, assert_same_tokens, hf_generate, make_pair, pad, random_prompts
from scipy import stats
from test_generate_stop_strings import random_strings, small_tokenizer
from transformers.generation import logits_process as hf

import optjax
from optjax.generation.prompt_lookup import look_up
from optjax.generation.settings import as_settings

SMALL = CONFIG.replace(hidden_size=12, num_attention_heads=3, max_position_embeddings=50)
V, NEW = CONFIG.vocab_size, 24
EOS = [3, 40]


@pytest.fixture(scope="module")
def models():
    """A model; one that knows nothing of it; and one that mostly agrees: the same weights, a little off."""
    model, params = make_pair(CONFIG, seed=3)
    rng = np.random.default_rng(0)
    near = jax.tree.map(lambda w: w + 0.03 * rng.standard_normal(w.shape).astype(w.dtype), params)
    return model, params, make_pair(SMALL, seed=4)[1], near


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return random_prompts(rng, 200, V, 10)


def drafters(models) -> dict[str, dict]:
    return {
        "stranger": dict(assistant_model=models[2], num_assistant_tokens=3),
        "friend": dict(assistant_model=models[3], num_assistant_tokens=5),
        "lookup": dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=3),
    }


PROCESSORS = dict(
    repetition_penalty=1.2, encoder_repetition_penalty=1.1, no_repeat_ngram_size=3, bad_words_ids=[[4], [30, 31]],
    min_new_tokens=5, forced_eos_token_id=40, sequence_bias={(7,): 1.0, (9, 12): 3.0}, begin_suppress_tokens=[11],
)  # fmt: skip


@pytest.mark.parametrize("name", ["stranger", "friend", "lookup"])
def test_greedy_ids_are_transformers_plain_ones(name, models, prompts):
    """200 prompts of mixed lengths whose rows accept different numbers of guesses, and end at different steps."""
    model, params = models[:2]
    theirs = hf_generate(model, prompts, NEW, eos_token_id=EOS)
    ids, mask = pad(prompts, "holes", np.random.default_rng(2), V)
    options = dict(max_new_tokens=NEW, eos_token_id=EOS, return_dict_in_generate=True)
    out = optjax.generate(params, ids, mask, **options, **drafters(models)[name])
    assert_same_tokens(np.asarray(out.sequences)[:, ids.shape[1] :], theirs)
    plain = optjax.generate(params, ids, mask, **options)
    same = (np.asarray(out.sequences) == np.asarray(plain.sequences)).all(1)
    np.testing.assert_allclose(np.asarray(out.logprobs)[same], np.asarray(plain.logprobs)[same], atol=1e-4)
    if name == "friend":
        assert int(out.passes) < 0.75 * int(plain.passes)


def test_greedy_with_processors(models, prompts):
    """Each guess is judged by the scores that it would meet."""
    params = models[1]
    ids, mask = pad(prompts[:30], "left", np.random.default_rng(2), V)
    options = dict(max_new_tokens=NEW, eos_token_id=EOS, **PROCESSORS)
    full = dict(return_dict_in_generate=True, output_scores=True)
    plain = optjax.generate(params, ids, mask, **options, **full)
    for name in ("friend", "lookup"):
        drafter = drafters(models)[name]
        out = optjax.generate(params, ids, mask, **options, **full, **drafter)
        np.testing.assert_array_equal(out.sequences, plain.sequences)
        for mine, other in ((out.scores, plain.scores), (out.logprobs, plain.logprobs)):
            mine, other = np.asarray(mine), np.asarray(other)
            new = np.asarray(out.sequences)[:, ids.shape[1] :]
            live = np.cumsum(np.isin(new, EOS), 1) - np.isin(new, EOS) == 0
            kept = np.isfinite(other[live])
            np.testing.assert_array_equal(np.isfinite(mine[live]), kept)
            np.testing.assert_allclose(mine[live][kept], other[live][kept], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_flat_cache_and_stop_strings(rows, models, prompts, monkeypatch):
    """The layout for TPUs, and rows that end in the midst of a round."""
    monkeypatch.setattr("optjax.cache.default_layout", lambda platform: "flat")
    params, rng = models[1], np.random.default_rng(3)
    tokenizer = small_tokenizer(rng)
    ids, mask = pad(prompts[:rows], "right", rng, V)
    for seed in range(3):
        strings = random_strings(np.random.default_rng(seed), tokenizer, V)
        options = dict(max_new_tokens=NEW - seed, eos_token_id=[], stop_strings=strings, tokenizer=tokenizer)
        plain = optjax.generate(params, ids, mask, **options)
        out = optjax.generate(params, ids, mask, **options, **drafters(models)["friend"])
        np.testing.assert_array_equal(out, plain)


def test_up_to_the_last_position(models):
    """The last round guesses past the end of the position table, and nothing comes of it."""
    params, near = models[1], models[3]
    ids = np.random.default_rng(0).integers(0, V, (3, 40))
    plain = optjax.generate(params, ids, max_new_tokens=24, eos_token_id=[])
    for assistant in (near, params):  # one program
        out = optjax.generate(params, ids, max_new_tokens=24, eos_token_id=[], assistant_model=assistant)
        np.testing.assert_array_equal(out, plain)


def test_more_guesses_than_there_is_room_for(models):
    """They are not made: a round would read them all, and the caches would have columns for them."""
    options = dict(eos_token_id=[], max_new_tokens=5)
    for drafter in (dict(prompt_lookup_num_tokens=10**6), dict(assistant_model=models[3], num_assistant_tokens=10**6)):
        found = as_settings(CONFIG, drafter, 5).speculation
        assert found is not None and found.width == 16
    out = optjax.generate(models[1], [[5, 6, 5]], prompt_lookup_num_tokens=10**6, **options)
    np.testing.assert_array_equal(out, optjax.generate(models[1], [[5, 6, 5]], **options))


def test_half_precision_inside_jit_and_compilations(models, prompts):
    params, near = models[1], models[3]
    ids, mask = pad(prompts[:6], "left", np.random.default_rng(0), V)
    half, assistant = (jax.tree.map(lambda w: w.astype(jnp.bfloat16), p) for p in (params, near))
    options = dict(max_new_tokens=12, eos_token_id=EOS)
    out = optjax.generate(half, ids, mask, assistant_model=assistant, return_dict_in_generate=True, **options)
    assert out.logprobs.dtype == np.float32 and int(out.passes) < 12
    with count_compilations() as count:
        for n in (3, 16):
            optjax.generate(
                half, ids[::-1], mask[::-1], assistant_model=half if n == 3 else assistant, max_new_tokens=n,
                eos_token_id=EOS, return_dict_in_generate=True,
            )  # fmt: skip
    assert count.compiled == 0
    drafter = drafters(models)["lookup"]
    expected = optjax.generate(params, ids, mask, **options, **drafter)
    inside = jax.jit(lambda p, i: optjax.generate(p, i, mask, **options, **drafter))(params, ids)
    np.testing.assert_array_equal(inside, expected)


def test_fewer_passes_on_a_text_that_repeats_itself():
    """opt-mini, greedy: the ids of plain decoding in at most two thirds of the passes, of each of two rows."""
    params, tokenizer = optjax.load("opt-mini")
    verse = "The farmer's in the dell, the farmer's in the dell, hi-ho, the derry-o, the farmer's in the dell.\n"
    texts = [verse * 3, "one two three four five six seven eight nine ten\n" * 6]
    for rows in (texts[:1], texts):
        options = dict(max_new_tokens=60, eos_token_id=[], return_dict_in_generate=True)
        plain = optjax.generate(params, *tokenizer(rows), **options)
        out = optjax.generate(params, *tokenizer(rows), **options, prompt_lookup_num_tokens=8)
        np.testing.assert_array_equal(out.sequences, plain.sequences)
        assert int(plain.passes) == 60
        assert int(out.passes) * 1.5 <= 60, int(out.passes)


# Sampling. Few tokens are left at each step, so that the distribution of three at once can be counted. After this
# prompt what prompt lookup guesses is sometimes probable.
PROMPT = [18, 37, 9, 40, 31, 29, 46, 23, 1, 7]
WARPED = dict(temperature=1.4, top_k=6, top_p=0.95, repetition_penalty=1.3)


def exact(model) -> dict[tuple[int, ...], float]:
    """The probability of each three tokens after the prompt, by torch in float64 and transformers' processors."""
    chain = [
        hf.RepetitionPenaltyLogitsProcessor(WARPED["repetition_penalty"]),
        hf.TemperatureLogitsWarper(WARPED["temperature"]),
        hf.TopKLogitsWarper(WARPED["top_k"]),
        hf.TopPLogitsWarper(WARPED["top_p"]),
    ]
    known = {(): 1.0}
    for _ in range(3):
        longer = {}
        for made, p in known.items():
            ids = torch.tensor([PROMPT + list(made)])
            with torch.no_grad():
                scores = model(ids).logits[:, -1].double()
            for processor in chain:
                scores = processor(ids, scores)
            q = torch.softmax(scores, -1)[0].numpy()
            longer |= {(*made, int(i)): p * q[i] for i in np.flatnonzero(q)}
        known = longer
    return known


@pytest.mark.parametrize("name", ["stranger", "friend", "lookup"])
def test_draws_follow_the_models_distribution(name, models):
    model, params = models[:2]
    expected = exact(model)
    counts = dict.fromkeys(expected, 0)
    ids = np.tile(PROMPT, (2048, 1))
    options = dict(max_new_tokens=3, do_sample=True, eos_token_id=[], **WARPED, **drafters(models)[name])
    for seed in range(6):
        out = np.asarray(optjax.generate(params, ids, key=jax.random.key(seed), **options))[:, -3:]
        for row in out.tolist():
            counts[tuple(row)] += 1  # a KeyError: what should have been left out
    observed, p = np.array(list(counts.values())), np.array(list(expected.values()))

    def goodness(p) -> float:
        often = p * observed.sum() >= 8
        groups = np.where(often, np.cumsum(often), 0)  # the rare ones together
        seen, wanted = np.bincount(groups, observed), np.bincount(groups, p) * observed.sum()
        return float(stats.chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue)

    assert (p * observed.sum() >= 8).sum() > 50
    assert goodness(p) > 1e-3
    # The test tells: the draws do not fit a distribution that is flatter.
    assert goodness(p**0.6 / (p**0.6).sum()) < 1e-6


def test_a_row_does_not_depend_on_the_others(models, prompts):
    params, rng = models[1], np.random.default_rng(0)
    ids, mask = pad(prompts[:6], "left", rng, V)
    options = dict(max_new_tokens=16, do_sample=True, temperature=1.5, key=jax.random.key(1), eos_token_id=EOS)
    drafter = drafters(models)["friend"]
    batch = np.asarray(optjax.generate(params, ids, mask, **options, **drafter))
    others = rng.integers(0, V, ids.shape)
    others[[0, 3]] = ids[[0, 3]]
    again = np.asarray(optjax.generate(params, others, mask, **options, **drafter))
    np.testing.assert_array_equal(again[[0, 3]], batch[[0, 3]])
    assert (again != batch).any(1).sum() == 4
    two = np.asarray(optjax.generate(params, ids[:3], mask[:3], num_return_sequences=2, **options, **drafter))
    repeated = optjax.generate(params, ids[:3].repeat(2, 0), mask[:3].repeat(2, 0), **options, **drafter)
    np.testing.assert_array_equal(two, repeated)
    steps = np.stack(list(optjax.stream(params, ids, mask, **options, **drafter)), 1)
    np.testing.assert_array_equal(steps, batch[:, ids.shape[1] :][:, : steps.shape[1]])


def test_look_up_by_brute_force():
    rng = np.random.default_rng(0)
    found = 0
    guessed = jax.jit(look_up, static_argnames=("width", "max_ngram"))
    for _ in range(150):
        n, begin = (int(rng.integers(*low_high)) for low_high in ((1, 15), (0, 4)))
        width, longest = [(1, 1), (4, 2), (2, 3), (5, 12), (4, 500)][rng.integers(5)]
        row = rng.integers(0, 3, n).tolist()
        if longest > 3:  # the row says itself twice
            row = (row * 2)[:15]
            n = len(row)
        tokens = np.array([[0] * begin + row + rng.integers(0, 3, 20).tolist()])[:, :24]
        guess = np.asarray(
            guessed(jnp.asarray(tokens), np.array([begin]), np.array([begin + n]), width=width, max_ngram=longest)
        )[0].tolist()
        for size in range(min(longest, n - 1), 0, -1):
            places = [at for at in range(size, n) if row[at - size : at] == row[n - size :]]
            if places:
                after = list(row)
                while len(after) < n + width:
                    after.append(after[len(after) - (n - places[-1])])
                assert guess == after[n:], (row, size)
                found += 1
                break
    assert found > 100
    row, one = np.zeros((1, 600), np.int32), np.array([400])
    sizes = [
        len(str(jax.make_jaxpr(lambda row, n=n: look_up(row, one, one, width=2, max_ngram=n))(row))) for n in (20, 500)
    ]
    assert sizes[1] < 1.1 * sizes[0]  # a program of the same size


def test_refusals(models):
    params, small = models[1], models[2]
    other = optjax.init_params(CONFIG.replace(vocab_size=48), jax.random.key(0))
    headless = optjax.init_params(SMALL, jax.random.key(0), head=None)
    ids = np.ones((2, 30), int)
    with count_compilations() as count:
        for options, part in (
            (dict(assistant_model=small, prompt_lookup_num_tokens=2), "both guess tokens; give one"),
            (dict(num_assistant_tokens=3), "num_assistant_tokens says how assistant_model works"),
            (dict(max_matching_ngram_size=3), "max_matching_ngram_size says how prompt_lookup_num_tokens works"),
            (dict(assistant_model=small, num_assistant_tokens=0), "num_assistant_tokens should be an integer of at"),
            (dict(prompt_lookup_num_tokens=0), "prompt_lookup_num_tokens should be an integer of at least 1"),
            (dict(assistant_model=other), "vocabulary has 48 ids and the model's 47"),
            (dict(assistant_model=headless), "causal_lm head, not params with the head None"),
            (dict(assistant_model="opt-125m"), "causal_lm head, not str"),
            (dict(assistant_model=small, max_new_tokens=21), "assistant_model's max_position_embeddings = 50"),
        ):
            with pytest.raises(ValueError, match=part):
                optjax.generate(params, ids, **({"max_new_tokens": 3} | options))
    assert count.compiled == 0
