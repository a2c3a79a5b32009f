"""Contrastive search beside transformers' 4.49."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compilations import count_compilations
from generation_helpers import CONFIG, make_pair, pad, random_prompts
from search_cases import check_answers

import optjax
from optjax.cache import LAYOUTS, Cache, init_cache, keep_one_column


def test_same_ids_as_transformers():
    """200 calls of two kinds, 4 prompts of mixed lengths each. See golden/make_search.py."""
    check_answers("contrastive", np.load(Path(__file__).parent / "golden" / "search_contrastive.npz"))


@pytest.mark.parametrize("penalty_alpha", [0.3, 0.9])
def test_what_may_not_come_does_not(penalty_alpha):
    """Fewer ids may come than there are candidates: the others have no probability, and are the most unlike."""
    params = make_pair(CONFIG, seed=3)[1]
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (8, 6))
    options = dict(penalty_alpha=penalty_alpha, top_k=5, max_new_tokens=6, eos_token_id=[])

    def new(ids, **more):
        return np.asarray(optjax.generate(params, ids, **options, **more))[:, ids.shape[1] :]

    assert set(new(ids, suppress_tokens=range(2, CONFIG.vocab_size)).flat) == {0, 1}
    assert (new(ids, forced_eos_token_id=7)[:, -1] == 7).all()
    assert (new(ids[:, :1], forced_bos_token_id=7)[:, 0] == 7).all()


def test_rows_streams_and_numbers():
    """A row alone and a stream say the same; another penalty_alpha compiles nothing; a tiny one is greedy search."""
    params = make_pair(CONFIG, seed=3)[1]
    rng = np.random.default_rng(0)
    prompts = random_prompts(rng, 4, CONFIG.vocab_size, 9)
    ids, mask = pad(prompts, "holes", rng, CONFIG.vocab_size)
    options = dict(top_k=3, max_new_tokens=12, eos_token_id=[4, 9])
    whole = np.asarray(optjax.generate(params, ids, mask, penalty_alpha=0.6, **options))[:, ids.shape[1] :]
    steps = np.stack(list(optjax.stream(params, ids, mask, penalty_alpha=0.6, **options)), axis=1)
    np.testing.assert_array_equal(whole[:, : steps.shape[1]], steps)
    for prompt, row in zip(prompts, whole, strict=True):
        alone = optjax.generate(params, prompt[None], penalty_alpha=0.6, **options)
        np.testing.assert_array_equal(np.asarray(alone)[0, len(prompt) :], row)
    with count_compilations() as count:
        nearly = optjax.generate(params, ids, mask, penalty_alpha=1e-7, **options)
    assert count.compiled == 0
    del options["top_k"]
    np.testing.assert_array_equal(nearly, optjax.generate(params, ids, mask, **options))
    assert (whole != np.asarray(nearly)[:, ids.shape[1] :]).any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keep_one_column(layout, rows):
    empty = init_cache(CONFIG, rows, 8, layout=layout)
    shape = empty.keys[0].shape
    keys = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    mask = empty.mask.at[:, :6].set(True)
    filled = Cache((keys,), (keys + 1,), mask, empty.lengths + 6, empty.index + 6, layout)
    chosen = np.array([2, 0, 1])[:rows]
    kept = keep_one_column(filled, chosen, 3)
    expected = keys.reshape(rows, *shape[-2 if layout == "flat" else -3 :]).copy()
    for row, column in zip(expected, chosen, strict=True):
        row[..., 3, :] = row[..., 3 + column, :]
    np.testing.assert_array_equal(kept.keys[0].reshape(expected.shape), expected)
    np.testing.assert_array_equal(kept.values[0].reshape(expected.shape), expected + 1)
    np.testing.assert_array_equal(kept.mask, np.arange(8)[None].repeat(rows, 0) < 4)
    assert int(kept.index) == 4 and (np.asarray(kept.lengths) == 4).all()
