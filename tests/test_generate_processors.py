"""The deterministic options of `generate` beside transformers', on 100 random prompts each.

Ours are padded with ids that the prompt does not hold, on the left or among its tokens; transformers gets each prompt
unpadded, because there padding counts as tokens seen (and an n-gram may span it).
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

import optjax
from optjax.generation.history import new_history
from optjax.generation.repetition import no_repeat_ngram
from optjax.generation.settings import as_settings

ROWS, NEW = 100, 14
V = CONFIG.vocab_size


@pytest.fixture(scope="module")
def case():
    """A model, and 100 prompts over few ids, so that there is something to repeat."""
    rng = np.random.default_rng(0)
    return *make_pair(CONFIG, seed=3), random_prompts(rng, ROWS, V, longest=14), rng


@pytest.fixture(scope="module")
def usual(case):
    """What comes with no option but the ends of sequence."""
    model, _, prompts, _ = case
    return hf_generate(model, prompts, NEW, eos_token_id=EOS).tokens


@pytest.mark.parametrize("penalty", [1.3, 0.8, 5.0])
def test_repetition_penalty(case, usual, penalty):
    check_option(case, usual, repetition_penalty=penalty)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_ngram_size(case, usual, size):
    check_option(case, usual, where="holes", no_repeat_ngram_size=size, changes=5)


def test_long_ngrams():
    """Beside transformers' processor, on rows that repeat themselves; and however long, a program of the same size."""
    rng = np.random.default_rng(0)
    rows = [np.resize(rng.integers(0, V, rng.integers(3, 9)), rng.integers(9, 41)) for _ in range(40)]
    ids, mask = (jnp.asarray(x) for x in pad(rows, "left", rng, V))
    scores, banned = jnp.zeros((40, V)), 0

    def process(n: int):
        settings = as_settings(CONFIG.replace(max_position_embeddings=512), {"no_repeat_ngram_size": n})
        return no_repeat_ngram(settings, new_history(ids, mask > 0, 8, V, settings), scores)

    for n in (9, 12, 25):
        theirs = transformers.NoRepeatNGramLogitsProcessor(n)
        expected = [theirs(torch.from_numpy(row)[None], torch.zeros(1, V))[0].numpy() for row in rows]
        np.testing.assert_array_equal(process(n), expected)
        banned += np.isinf(expected).sum()
    assert banned > 20
    sizes = [len(str(jax.make_jaxpr(process, static_argnums=0)(n))) for n in (20, 500)]
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize("minimum", [1, 4, NEW])
def test_min_new_tokens(case, usual, minimum):
    tokens = check_option(case, usual, min_new_tokens=minimum, changes=1)
    assert not np.isin(tokens[:, :minimum], EOS).any()


def common_bigrams(usual: np.ndarray, count: int) -> list[list[int]]:
    pairs, times = np.unique(np.stack([usual[:, :-1].ravel(), usual[:, 1:].ravel()], 1), axis=0, return_counts=True)
    return pairs[np.argsort(-times)][:count].tolist()


def test_bad_words(case, usual):
    """Single ids, sequences of two and three, one that is an end of sequence (left out), all in one list."""
    single = [[int(i)] for i in np.bincount(usual.ravel()).argsort()[-3:]]
    check_option(case, usual, bad_words_ids=single)
    pairs = common_bigrams(usual, 8)
    # a prompt shorter than a bad word is where we differ: see below
    case = (*case[:2], [np.concatenate([[9, 9], prompt]) for prompt in case[2]], case[3])
    usual = hf_generate(case[0], case[2], NEW, eos_token_id=EOS).tokens
    words = [*pairs, [EOS[0]], [9, *pairs[0]], *[[*pair, int(usual[0, 3])] for pair in pairs[:3]], single[0]]
    check_option(case, usual, where="holes", bad_words_ids=words)


def test_bad_word_whose_prefix_is_the_whole_row(case):
    """We ban its last id as anywhere else; transformers only where the row is longer than the word."""
    model, params, _, _ = case
    prompt = np.array([21])
    first = hf_generate(model, [prompt], 1).tokens[0, 0]
    word = [[21, int(first)]]
    assert hf_generate(model, [prompt], 1, bad_words_ids=word).tokens[0, 0] == first
    ours = optjax.generate(params, prompt[None], max_new_tokens=1, bad_words_ids=word)
    assert np.asarray(ours)[0, 1] != first
    # and a word longer than the row says nothing
    longer = [[21, 21, int(first)]]
    ours = optjax.generate(params, prompt[None], max_new_tokens=1, bad_words_ids=longer)
    assert np.asarray(ours)[0, 1] == first


def test_suppress_tokens(case, usual):
    common = np.bincount(usual.ravel(), minlength=V).argsort()[-6:]
    tokens = check_option(case, usual, suppress_tokens=common.tolist())
    assert not np.isin(tokens, common[common != 1]).any()


@pytest.mark.parametrize("eos", [[], 11, [11], [5, 11, 17, 23]], ids=str)
def test_eos_token_id(case, usual, eos):
    """None, one, or many; the config's own, 2, is not among them and must not end a row."""
    tokens = check_option(case, usual, eos_token_id=eos, changes=20)
    ends = np.isin(tokens, eos).any(1).sum()
    assert ends == 0 if eos == [] else 0 < ends < ROWS


def test_eos_of_the_config(case):
    """Without the option, transformers' own default: the config's id."""
    model, params, prompts, rng = case
    theirs = hf_generate(model, prompts, NEW, eos_token_id=2)
    assert 0 < (theirs.tokens == 2).any(1).sum() < ROWS
    ids, mask = pad(prompts, "left", rng, V)
    assert_same_tokens(np.asarray(optjax.generate(params, ids, mask, max_new_tokens=NEW))[:, ids.shape[1] :], theirs)


def test_all_at_once(case, usual):
    for where in ("left", "holes", "right"):
        check_option(
            case,
            usual,
            where=where,
            repetition_penalty=1.2,
            no_repeat_ngram_size=2,
            bad_words_ids=[[4], [30, 31]],
            min_new_tokens=3,
            suppress_tokens=[6, 7],
        )


def test_pad_token_id(case):
    """What follows an end of sequence, and nothing else, is the pad id that was asked for."""
    _, params, prompts, rng = case
    ids, mask = pad(prompts, "left", rng, V)
    default, other = (
        np.asarray(optjax.generate(params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS, **option))[
            :, ids.shape[1] :
        ]
        for option in ({}, {"pad_token_id": 46})
    )
    ends = np.isin(default, EOS)
    after = np.cumsum(ends, axis=1) - ends > 0
    assert after.any() and (default[after] == 1).all() and (other[after] == 46).all()
    np.testing.assert_array_equal(default[~after], other[~after])
