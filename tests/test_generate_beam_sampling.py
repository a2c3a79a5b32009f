"""Beam sampling: its answers are distributed as transformers' are, and its draws as draws without replacement."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
import torch
from generation_helpers import CONFIG, make_pair
from scipy import stats

import optjax
from optjax.generation.draw import draw_several

ROWS = 6000
SMALL = CONFIG.replace(vocab_size=7, pad_token_id=1)
CASES = {
    "plain": dict(temperature=1.3, top_k=6, top_p=0.999),
    "few are left": dict(temperature=0.7, top_k=1, top_p=0.3),
}


@pytest.fixture(scope="module")
def pair():
    return make_pair(SMALL, seed=4)


@pytest.mark.parametrize("case", CASES)
def test_same_distribution_as_transformers(case, pair):
    """Both hypotheses of 6000 searches beside those of 6000 of theirs, by a chi-square test of homogeneity."""
    model, params = pair
    ids = np.tile([5, 4, 0, 3], (ROWS, 1))
    options = dict(do_sample=True, num_beams=2, num_return_sequences=2, max_new_tokens=2, eos_token_id=6)
    options |= CASES[case] | dict(length_penalty=0.5)
    torch.manual_seed(0)
    theirs = model.generate(torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long), **options)
    ours = optjax.generate(params, ids, key=jax.random.key(0), **options)
    outcomes = [np.asarray(each)[:, 4:].reshape(ROWS, -1) @ 7 ** np.arange(4) for each in (ours, theirs.numpy())]
    counts = np.stack([np.bincount(each, minlength=7**4) for each in outcomes])
    assert (counts > 0).all(0).sum() > 4, "there is more to draw"
    often = counts.sum(0) >= 16
    table = np.concatenate([counts[:, often], counts[:, ~often].sum(1, keepdims=True)], axis=1)
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def test_a_row_minds_its_own_key(pair):
    """The same key gives the same answers, another one others; a row's do not depend on the rows after it."""
    ids = np.tile([5, 4, 0, 3], (3, 1))
    options = dict(do_sample=True, num_beams=3, max_new_tokens=12, eos_token_id=[])
    first, again, other = (
        np.asarray(optjax.generate(pair[1], ids, key=jax.random.key(seed), **options)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[0] != first[1]).any()
    np.testing.assert_array_equal(optjax.generate(pair[1], ids[:2], key=jax.random.key(1), **options), first[:2])


def test_draws_without_replacement():
    """Three draws of seven, in order: each has its share of what is left. Of 600 columns too, over several blocks."""
    rng = np.random.default_rng(0)
    for v, at in ((7, np.arange(7)), (600, np.array([0, 100, 255, 256, 300, 511, 599]))):
        p = rng.dirichlet(np.ones(7))
        scores = np.full((20000, v), -np.inf, np.float32)
        scores[:, at] = np.log(p) + 3
        picked, index = draw_several(jax.random.split(jax.random.key(v), 20000), scores, 3)
        drawn = np.searchsorted(at, np.asarray(index))
        np.testing.assert_array_equal(at[drawn], index)
        np.testing.assert_array_equal(picked, np.take_along_axis(scores, np.asarray(index), 1))
        triples = list(itertools.permutations(range(7), 3))
        expected = np.array([p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in triples]) * 20000
        observed = np.bincount(drawn @ [49, 7, 1], minlength=343)[[a * 49 + b * 7 + c for a, b, c in triples]]
        assert observed.sum() == 20000, "something was drawn twice"
        often = expected >= 8
        observed = np.append(observed[often], observed[~often].sum())
        expected = np.append(expected[often], expected[~often].sum())
        assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-3


def test_more_draws_than_there_are():
    scores = np.full((1, 9), -np.inf, np.float32)
    scores[0, 4] = 2.0
    picked, _ = draw_several(jax.random.split(jax.random.key(0), 1), scores, 3)
    np.testing.assert_array_equal(picked, [[2.0, -np.inf, -np.inf]])
