"""Greedy `generate` beside transformers': ids, scores and log-probabilities, whatever the padding and the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from generation_helpers import (
    CONFIG,
    PAD,
    assert_same_tokens,
    hf_generate,
    hf_generate_padded,
    make_pair,
    pad,
    random_prompts,
)
from hf_models import assert_close

import optjax

ROWS, LONGEST, NEW = 100, 14, 12
# Enough of them that in every model some rows end early, and some do not.
EOS = list(range(2, CONFIG.vocab_size, 6))

CONFIGS = {
    "pre-norm, tied": CONFIG.replace(num_hidden_layers=2, tie_word_embeddings=True),
    "post-norm, projected": CONFIG.replace(
        num_hidden_layers=2, tie_word_embeddings=True, do_layer_norm_before=False, word_embed_proj_dim=10
    ),
    "no final norm, gelu": CONFIG.replace(_remove_final_layer_norm=True, activation_function="gelu"),
    "no bias, no affine, one head": CONFIG.replace(
        enable_bias=False, layer_norm_elementwise_affine=False, num_attention_heads=1, word_embed_proj_dim=40
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    rng = np.random.default_rng(5)
    return *make_pair(config, seed=3), random_prompts(rng, ROWS, config.vocab_size, LONGEST), rng


def test_same_ids_as_transformers(case):
    """100 random prompts of mixed lengths: ours padded left, right and with holes, theirs padded left."""
    model, params, prompts, rng = case
    left = pad(prompts, "left", rng, CONFIG.vocab_size)
    theirs = hf_generate_padded(model, *left, NEW, eos_token_id=EOS)
    ends = (theirs.tokens == PAD).any(1)
    assert 10 < ends.sum() < 95, "some rows should end early, and some should not"
    assert len(np.unique(theirs.tokens)) > 20, "the model should have more to say"
    for where in ("left", "right", "holes"):
        ids, mask = left if where == "left" else pad(prompts, where, rng, CONFIG.vocab_size)
        ours = np.asarray(optjax.generate(params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS))
        np.testing.assert_array_equal(ours[:, : ids.shape[1]], ids)
        assert_same_tokens(ours[:, ids.shape[1] :], theirs)


def test_batch_equals_single(case):
    """Alone and unpadded, a prompt gets exactly the tokens that it gets among 99 others."""
    _, params, prompts, rng = case
    ids, mask = pad(prompts, "holes", rng, CONFIG.vocab_size)
    batch = np.asarray(optjax.generate(params, ids, mask, max_new_tokens=NEW, eos_token_id=EOS))
    for prompt, row in zip(prompts[:25], batch, strict=False):
        single = optjax.generate(params, prompt[None], max_new_tokens=NEW, eos_token_id=EOS)
        np.testing.assert_array_equal(np.asarray(single)[0, len(prompt) :], row[ids.shape[1] :])


def test_scores_and_logprobs():
    """Processed scores, and log-probabilities as of compute_transition_scores(normalize_logits=True)."""
    model, params = make_pair(CONFIG, seed=1)
    rng = np.random.default_rng(2)
    prompts = random_prompts(rng, 20, CONFIG.vocab_size, LONGEST)
    options = dict(eos_token_id=EOS, repetition_penalty=1.3, suppress_tokens=[5, 6, 7], min_new_tokens=3)
    theirs = hf_generate(model, prompts, NEW, **options)
    ids, mask = pad(prompts, "right", rng, CONFIG.vocab_size)
    ours = optjax.generate(
        params, ids, mask, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True, **options
    )
    assert_same_tokens(np.asarray(ours.sequences)[:, ids.shape[1] :], theirs)
    assert ours.scores is not None
    scores, logprobs = np.asarray(ours.scores), np.asarray(ours.logprobs)
    live = ~np.isnan(theirs.scores).any(-1)
    assert (~live).sum() > 20 and live.sum() > 50
    banned = theirs.scores[live] == -np.inf
    np.testing.assert_array_equal(scores[live] == -np.inf, banned)
    assert banned.any()
    assert_close(np.where(banned, 0, scores[live]), np.where(banned, 0, theirs.scores[live]))
    normalized = torch.log_softmax(torch.from_numpy(theirs.scores), dim=-1).numpy()
    expected = np.take_along_axis(normalized, theirs.tokens[..., None], axis=-1)[..., 0]
    assert_close(logprobs[live], expected[live])
    assert (logprobs[~live] == 0).all()

    # theirs, by their own function, for one prompt
    alone = model.generate(
        torch.from_numpy(prompts[0][None]),
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    transition = model.compute_transition_scores(alone.sequences, alone.scores, normalize_logits=True).numpy()
    assert_close(logprobs[0, : transition.shape[1]], transition[0])


def test_only_what_was_asked_for():
    _, params = make_pair(CONFIG, seed=1)
    out = optjax.generate(params, [[5, 6]], max_new_tokens=3, return_dict_in_generate=True)
    assert out.scores is None and out.logprobs.shape == (1, 3) and out.logprobs.dtype == np.float32
    plain = optjax.generate(params, [[5, 6]], max_new_tokens=3)
    assert plain.dtype == np.int32
    np.testing.assert_array_equal(plain, out.sequences)
