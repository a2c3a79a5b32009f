"""Beam search beside transformers': ids, scores and indices of the best hypotheses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from generation_helpers import CONFIG, make_pair, pad, random_prompts
from hf_models import assert_close
from search_cases import check_answers
from test_generate_stop_strings import first_stops, small_tokenizer

import optjax

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("strategy", ["beam", "group"])
def test_same_hypotheses_as_transformers(strategy):
    """200 calls of several kinds, 4 prompts of mixed lengths each: all ids. See golden/make_search.py."""
    check_answers(strategy, np.load(GOLDEN / f"search_{strategy}.npz"))


def test_what_else_is_told():
    """beam_indices, scores, and what each token added; the same ids for padding anywhere and for a row alone."""
    model, params = make_pair(CONFIG, seed=3)
    rng = np.random.default_rng(1)
    prompts = random_prompts(rng, 5, CONFIG.vocab_size, 9)
    ids, mask = pad(prompts, "left", rng, CONFIG.vocab_size)
    options = dict(num_beams=3, num_return_sequences=2, eos_token_id=[4, 9, 30], length_penalty=0.5, max_new_tokens=9)
    told = dict(return_dict_in_generate=True, output_scores=True)
    theirs = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options, **told)
    ours = optjax.generate(params, ids, mask, **options, **told)
    n = theirs.beam_indices.shape[1]
    np.testing.assert_array_equal(ours.sequences[:, : ids.shape[1] + n], theirs.sequences.numpy())
    np.testing.assert_array_equal(ours.beam_indices[:, :n], theirs.beam_indices.numpy())
    assert (np.asarray(ours.beam_indices)[:, n:] == -1).all()
    assert_close(ours.sequences_scores, theirs.sequences_scores.numpy())
    added = model.compute_transition_scores(theirs.sequences, theirs.scores, theirs.beam_indices).numpy()
    assert_close(np.asarray(ours.logprobs)[:, :n], added)
    their_scores = np.stack([step.numpy() for step in theirs.scores], 1)
    live = np.asarray(ours.beam_indices)[:, :n]
    for row, column in np.argwhere(live >= 0):
        at = live[row, column], column
        assert_close(np.asarray(ours.scores)[at], their_scores[at])

    for where in ("right", "holes"):
        other = optjax.generate(params, *pad(prompts, where, rng, CONFIG.vocab_size), **options, **told)
        np.testing.assert_array_equal(other.sequences[:, -9:], ours.sequences[:, -9:])
    for row, prompt in enumerate(prompts):
        alone = optjax.generate(optjax.stack_layers(params), prompt[None], **options)
        np.testing.assert_array_equal(alone[:, -9:], ours.sequences[2 * row : 2 * row + 2, -9:])


def test_stop_strings():
    """Hypotheses that end with a text, of one token or of parts of two."""
    model, params = make_pair(CONFIG, seed=3)
    rng = np.random.default_rng(2)
    tokenizer = small_tokenizer(rng)
    prompts = random_prompts(rng, 20, CONFIG.vocab_size, 9)
    ids, mask = pad(prompts, "left", rng, CONFIG.vocab_size)
    options = dict(num_beams=3, num_return_sequences=2, eos_token_id=[4, 9], max_new_tokens=9)
    strings = ["a\n", "b", "éa", " "]

    def has_stop(rows: torch.Tensor, scores: object) -> torch.Tensor:
        """Their own criterion has no patience for these tokens."""
        first = np.repeat(ids.shape[1] - mask.sum(1), len(rows) // len(ids))
        rows = [row[start:].tolist() for row, start in zip(rows, first, strict=True)]
        ends = first_stops(tokenizer, rows, [ids.shape[1] - start for start in first], strings)
        return torch.tensor([end > 0 for end in ends])

    theirs = model.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), stopping_criteria=[has_stop], **options
    ).numpy()
    ours = np.asarray(optjax.generate(params, ids, mask, tokenizer=tokenizer, stop_strings=strings, **options))
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    without = np.asarray(optjax.generate(params, ids, mask, **options))
    assert (ours != without).any(1).sum() > 10
