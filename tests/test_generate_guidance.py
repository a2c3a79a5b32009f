"""Classifier-free guidance beside transformers': ids of mixed batches, with and without negative prompts."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from generation_helpers import CONFIG, PAD, assert_same_tokens, hf_generate, make_pair, pad, random_prompts

import optjax

V, NEW, EOS = CONFIG.vocab_size, 10, [3, 40]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return *make_pair(CONFIG, seed=3), random_prompts(rng, 200, V, longest=10), rng


def test_away_from_the_last_token_alone(case):
    model, params, prompts, rng = case
    ids, mask = pad(prompts, "holes", rng, V)
    usual = hf_generate(model, prompts, NEW, eos_token_id=EOS).tokens
    for scale in (1.7, 0.4):
        theirs = hf_generate(model, prompts, NEW, eos_token_id=EOS, guidance_scale=scale)
        assert (theirs.tokens != usual).any(1).mean() > 0.2
        ours = optjax.generate(params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS, guidance_scale=scale)
        assert_same_tokens(np.asarray(ours)[:, ids.shape[1] :], theirs)


def test_negative_prompts(case):
    """Longer and shorter than the prompts, padded anywhere; with a processor after it; streamed."""
    model, params, prompts, rng = case
    prompts, negative = prompts[:60], random_prompts(rng, 60, V, longest=20)
    options = dict(eos_token_id=EOS, guidance_scale=1.8, repetition_penalty=1.2)
    expected = np.full((60, NEW), PAD)
    for row, (prompt, other) in enumerate(zip(prompts, negative, strict=True)):
        ids = torch.from_numpy(prompt[None])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=PAD,
            negative_prompt_ids=torch.from_numpy(other[None]), **options,
        ).numpy()[0, len(prompt) :]  # fmt: skip
        expected[row, : len(out)] = out
    ids, mask = pad(prompts, "left", rng, V)
    theirs, their_mask = pad(negative, "holes", rng, V)
    options |= dict(negative_prompt_ids=theirs, negative_prompt_attention_mask=their_mask, max_new_tokens=NEW)
    ours = np.asarray(optjax.generate(params, ids, mask, **options))[:, ids.shape[1] :]
    assert (ours == expected).all(1).mean() >= 0.98  # but for near ties
    steps = np.stack(list(optjax.stream(params, ids, mask, **options)), 1)
    np.testing.assert_array_equal(steps, ours[:, : steps.shape[1]])


def test_samples_of_one_prompt(case):
    _, params, prompts, rng = case
    ids, mask = pad(prompts[:3], "left", rng, V)
    options = dict(max_new_tokens=NEW, guidance_scale=1.5, do_sample=True, key=jax.random.key(0))
    two = optjax.generate(params, ids, mask, num_return_sequences=2, **options)
    repeated = optjax.generate(params, ids.repeat(2, 0), mask.repeat(2, 0), **options)
    np.testing.assert_array_equal(two, repeated)


def test_refusals(case):
    _, params, prompts, _ = case
    ids = prompts[0][None]
    for options, part in (
        (dict(guidance_scale="2"), "guidance_scale should be a number"),
        (dict(negative_prompt_ids=ids), "of no use without a guidance_scale"),
        (dict(guidance_scale=2, negative_prompt_attention_mask=ids), "negative_prompt_ids, which are not given"),
        (
            dict(guidance_scale=2, negative_prompt_ids=ids, negative_prompt_attention_mask=np.zeros_like(ids)),
            "negative_prompt_attention_mask is all 0 in row 0",
        ),
        (dict(guidance_scale=2, prompt_lookup_num_tokens=3), "do not go together"),
        (dict(guidance_scale=2, num_beams=2), "goes with neither num_beams above 1"),
        (dict(guidance_scale=2, negative_prompt_ids=ids.repeat(2, 0)), "a row for each of the 1 prompts"),
        (dict(guidance_scale=2, negative_prompt_ids=[[47]]), "outside the vocabulary"),
        (dict(guidance_scale=2, negative_prompt_ids=np.ones((1, 62), int)), "make 65, more than max_position"),
    ):
        with pytest.raises(ValueError, match=part):
            optjax.generate(params, ids, max_new_tokens=3, **options)
