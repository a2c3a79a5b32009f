"""The rarer deterministic options of `generate` beside transformers', on 200 random prompts each.

Ours are padded on the left or among their tokens; transformers gets each prompt unpadded, because there padding counts
as a part of the prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from generation_helpers import (
    CONFIG,
    EOS,
    assert_same_tokens,
    check_option,
    hf_generate,
    make_pair,
    pad,
    random_prompts,
)
from hf_models import assert_close

import optjax

ROWS, NEW = 200, 12
V = CONFIG.vocab_size


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return *make_pair(CONFIG, seed=3), random_prompts(rng, ROWS, V, longest=10), rng


@pytest.fixture(scope="module")
def usual(case):
    """What comes with no option but the ends of sequence."""
    model, _, prompts, _ = case
    tokens = hf_generate(model, prompts, NEW, eos_token_id=EOS).tokens
    assert 20 < np.isin(tokens[:, : NEW - 2], EOS).any(1).sum() < ROWS - 20, "some rows should end early"
    return tokens


@pytest.mark.parametrize("penalty", [1.4, 0.7])
def test_encoder_repetition_penalty(case, usual, penalty):
    check_option(case, usual, encoder_repetition_penalty=penalty)


@pytest.mark.parametrize("size", [1, 3])
def test_encoder_no_repeat_ngram_size(case, usual, size):
    """A prompt that says again what the model would: else there is little to forbid."""
    case = (*case[:2], [np.concatenate([p, row[:6], p]) for p, row in zip(case[2], usual, strict=True)], case[3])
    usual = hf_generate(case[0], case[2], NEW, eos_token_id=EOS).tokens
    check_option(case, usual, where="holes", encoder_no_repeat_ngram_size=size, changes=5)


def test_min_length(case, usual):
    """Of the whole row: some prompts are as long already."""
    lengths = np.array([len(prompt) for prompt in case[2]])
    assert (lengths < 9).any() and (lengths >= 9).any()
    tokens = check_option(case, usual, where="holes", min_length=9)
    for row, n in zip(tokens, lengths, strict=True):
        assert not np.isin(row[: max(9 - n, 0)], EOS).any()


def test_sequence_bias(case, usual):
    """Single ids and sequences of up to three, for and against, several of them with the same end."""
    # A prompt shorter than a sequence is where we differ: see bad_words in test_generate_processors.py.
    case = (*case[:2], [np.concatenate([[9, 9], prompt]) for prompt in case[2]], case[3])
    usual = hf_generate(case[0], case[2], NEW, eos_token_id=EOS).tokens
    pairs, times = np.unique(np.stack([usual[:, :-1].ravel(), usual[:, 1:].ravel()], 1), axis=0, return_counts=True)
    often = pairs[np.argsort(-times)][:6].tolist()
    bias = {(7,): 1.5, (EOS[0],): -2.0, (9, *often[0]): 4.0, (often[1][1],): 0.5, (5,): float("-inf")}
    bias |= {tuple(pair): -3.0 for pair in often[:3]} | {tuple(pair): 2.5 for pair in often[3:]}
    first = check_option(case, usual, where="holes", sequence_bias=bias)
    pairs = [[list(ids), value] for ids, value in bias.items()]
    np.testing.assert_array_equal(check_option(case, usual, sequence_bias=pairs), first)


def test_forced_tokens(case, usual):
    """A prompt of one token is followed by the forced one; the last of max_new_tokens is an end, if none was before."""
    one = np.array([len(prompt) == 1 for prompt in case[2]])
    assert 5 < one.sum() < 100
    tokens = check_option(case, usual, forced_bos_token_id=33)
    assert (tokens[one, 0] == 33).all() and (tokens[~one, 0] != 33).any()
    tokens = check_option(case, usual, forced_eos_token_id=EOS[1])
    assert np.isin(tokens, EOS).any(1).all()


def test_begin_suppress_tokens(case, usual):
    first = np.bincount(usual[:, 0], minlength=V).argsort()[-5:].tolist()
    tokens = check_option(case, usual, begin_suppress_tokens=first)
    assert not np.isin(tokens[:, 0], first).any() and np.isin(tokens[:, 1:], first).any()
    # after a forced first token: the second
    check_option(case, usual, forced_bos_token_id=first[0], begin_suppress_tokens=first)


@pytest.mark.parametrize("start, factor", [(4, 1.5), (0, 0.8)])
def test_exponential_decay_length_penalty(case, usual, start, factor):
    check_option(case, usual, exponential_decay_length_penalty=(start, factor), changes=3)


def test_forbidden_ends_stay_forbidden_under_a_decay(case):
    """Where transformers has -inf + inf = NaN."""
    _, params, prompts, rng = case
    ids, mask = pad(prompts, "left", rng, V)
    out = optjax.generate(
        params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS, min_new_tokens=8,
        exponential_decay_length_penalty=(1, 3.0), return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert not np.isnan(np.asarray(out.scores)).any()
    new = np.asarray(out.sequences)[:, ids.shape[1] :]
    assert not np.isin(new[:, :8], EOS).any() and np.isin(new, EOS).any(1).mean() > 0.9


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_decay_may_grow_beyond_all_numbers(case, do_sample):
    """10 ** 60 is none of float32's; an end that may come then comes, and one that may not does not."""
    _, params, prompts, rng = case
    ids, mask = pad(prompts, "left", rng, V)
    out = optjax.generate(
        params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS, min_new_tokens=NEW - 2, do_sample=do_sample,
        exponential_decay_length_penalty=(0, 1e20), return_dict_in_generate=True, key=jax.random.key(0),
    )  # fmt: skip
    assert np.isfinite(np.asarray(out.logprobs)).all()
    new = np.asarray(out.sequences)[:, ids.shape[1] :]
    assert not np.isin(new[:, : NEW - 2], EOS).any() and np.isin(new[:, NEW - 2], EOS).all()


class Halves(transformers.LogitsProcessor):
    """Scores of ids that the row's last two tokens add up to become 20 higher, as `prefers_sums` below has it."""

    def __call__(self, input_ids, scores):
        last = (input_ids[:, -1:] + (input_ids[:, -2:-1] if input_ids.shape[1] > 1 else 1)) % V
        return scores.scatter_add(1, last, torch.full(last.shape, 20.0))


def prefers_sums(ids, scores):
    last = (ids[:, -1] + ids[:, -2]) % V
    return scores + 20.0 * jax.nn.one_hot(last, V)


def halved(ids, scores):
    return jnp.where(jnp.arange(V) % 2 == 0, scores / 2, scores)


class Halved(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.where(torch.arange(V) % 2 == 0, scores / 2, scores)


def test_logits_processor(case, usual):
    """Functions of one's own, in order; a prompt of one token has the pad id, 1, before it."""
    check_option(case, usual, "holes", logits_processor=prefers_sums, theirs={"logits_processor": [Halves()]})
    both = dict(logits_processor=[halved, prefers_sums], suppress_tokens=[6])
    check_option(case, usual, "left", **both, theirs={"logits_processor": [Halved(), Halves()]})


def test_logits_processor_sees_the_row(case):
    """All of it, at the right end, of one width at every step."""
    _, params, prompts, rng = case
    seen = []

    def spy(ids, scores):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), ids, ordered=True)
        return scores

    ids, mask = pad(prompts[:5], "holes", rng, V)
    out = np.asarray(
        optjax.generate(params, ids, mask, max_new_tokens=6, eos_token_id=[], pad_token_id=0, logits_processor=spy)
    )
    jax.effects_barrier()
    assert len(seen) == 6 and len({each.shape for each in seen}) == 1
    for step, rows in enumerate(seen):
        for row, prompt, new in zip(rows, prompts, out[:, ids.shape[1] :], strict=False):
            text = np.concatenate([prompt, new[:step]])
            np.testing.assert_array_equal(row[-len(text) :], text)
            assert (row[: -len(text)] == 0).all()


def test_renormalize_logits_and_invalid_values(case, usual):
    """Scores, which is where they show."""
    model, params, prompts, rng = case
    prompts = prompts[:40]
    ids, mask = pad(prompts, "left", rng, V)
    for options in (
        dict(renormalize_logits=True, suppress_tokens=[5], repetition_penalty=1.3),
        dict(remove_invalid_values=True, bad_words_ids=[[5], [8]], suppress_tokens=[9]),
    ):
        theirs = hf_generate(model, prompts, NEW, eos_token_id=EOS, **options)
        ours = optjax.generate(
            params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        assert_same_tokens(np.asarray(ours.sequences)[:, ids.shape[1] :], theirs)
        scores = np.asarray(ours.scores)
        live = ~np.isnan(theirs.scores).any(-1)
        least = np.finfo(np.float32).min
        for value in (-np.inf, least):
            np.testing.assert_array_equal(scores[live] == value, theirs.scores[live] == value)
        if "renormalize_logits" in options:
            np.testing.assert_allclose(np.exp(scores[live]).sum(-1), 1, rtol=1e-5)
        else:
            assert (scores[live][:, [5, 8]] == least).all() and (scores[live][:, 9] == -np.inf).all()
        usual_values = np.isfinite(theirs.scores[live]) & (theirs.scores[live] > least)
        assert_close(np.where(usual_values, scores[live], 0), np.where(usual_values, theirs.scores[live], 0))


def test_all_at_once(case, usual):
    """In transformers' order. Without the decay, of which there a forbidden end makes NaN."""
    case = (*case[:2], [np.concatenate([[9, 9], prompt]) for prompt in case[2]], case[3])
    check_option(
        case, usual, where="holes", theirs={"logits_processor": [Halved()]}, logits_processor=halved,
        sequence_bias={(7,): 1.5, (9, 9, 4): 3.0}, encoder_repetition_penalty=1.3, repetition_penalty=1.2,
        no_repeat_ngram_size=3, encoder_no_repeat_ngram_size=2, bad_words_ids=[[4], [30, 31]], min_length=8,
        forced_bos_token_id=5,
        suppress_tokens=[6, 7], begin_suppress_tokens=[10, 11, 12], renormalize_logits=True,
    )  # fmt: skip
