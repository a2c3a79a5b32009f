"""`score` beside torch's log-softmax of transformers' logits: totals, each token, and the alternatives."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from compilations import count_compilations
from generation_helpers import CONFIG, make_pair, random_prompts
from hf_models import assert_close

import optjax

V = CONFIG.vocab_size


@pytest.fixture(scope="module")
def pair():
    return make_pair(CONFIG.replace(num_hidden_layers=2), seed=3)


@pytest.fixture(scope="module")
def texts():
    return random_prompts(np.random.default_rng(0), 60, V, 40)


def expected(model, text: np.ndarray) -> np.ndarray:
    """Log-probabilities ``[n - 1, V]`` of what follows each token but the last, in float64."""
    with torch.no_grad():
        logits = model(torch.from_numpy(text)[None]).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1).numpy()


def test_every_token_as_torch(pair, texts):
    """Sixty texts of 1 to 40 tokens, in batches: order, neighbours and buckets do not show."""
    model, params = pair
    scores = optjax.score(params, texts, top_logprobs=5)
    assert len(scores) == 60
    for text, score in zip(texts, scores, strict=True):
        np.testing.assert_array_equal(score.ids, text)
        assert score.token_logprobs.dtype == np.float32 and np.isnan(score.token_logprobs[0])
        assert (score.top_ids[0] == -1).all() and np.isnan(score.top_logprobs[0]).all()
        assert (score.token_logprobs[1:] <= 0).all() and (score.top_logprobs[1:] <= 0).all()
        if len(text) == 1:
            assert score.logprob == 0 and score.is_greedy
            continue
        log_p = expected(model, text)
        chosen = np.take_along_axis(log_p, text[1:, None], 1)[:, 0]
        assert_close(score.token_logprobs[1:], chosen)
        assert_close([score.logprob], [chosen.sum()])
        order = np.argsort(-log_p, axis=1)[:, :5]
        np.testing.assert_array_equal(score.top_ids[1:], order)
        assert_close(score.top_logprobs[1:], np.take_along_axis(log_p, order, 1))


def test_continuations_as_torch(pair, texts):
    """The end of each text after its beginning; one that greedy decoding would say, and an empty prompt."""
    model, params = pair
    rng = np.random.default_rng(1)
    cuts = [int(rng.integers(0, len(text))) for text in texts]
    greedy = np.asarray(optjax.generate(params, texts[0][None], max_new_tokens=7, eos_token_id=[]))[0, len(texts[0]) :]
    prompts = [text[:cut].tolist() for text, cut in zip(texts, cuts, strict=True)] + [texts[0]]
    ends = [text[cut:].tolist() for text, cut in zip(texts, cuts, strict=True)] + [greedy]
    scores = optjax.score(params, prompts, ends)
    assert scores[-1].is_greedy and sum(score.is_greedy for score in scores) < 20
    assert 0 in cuts
    for prompt, end, score in zip(prompts, ends, scores, strict=True):
        assert score.top_ids is None and len(score.token_logprobs) == len(end)
        text = np.array([*prompt, *end])
        first = max(len(prompt), 1)
        if first == len(text):
            continue
        log_p = expected(model, text)[first - 1 :]
        chosen = np.take_along_axis(log_p, text[first:, None], 1)[:, 0]
        assert_close(score.token_logprobs[first - len(prompt) :], chosen)
        assert_close([score.logprob], [chosen.sum()])
        assert np.isnan(score.token_logprobs).sum() == (len(prompt) == 0)
        assert score.is_greedy == (log_p.argmax(1) == text[first:]).all()


def test_rows_as_they_come(pair, texts):
    """From iterators, which can be gone through once."""
    _, params = pair
    prompts, ends = [text[:1] for text in texts[:3]], [text[:4] for text in texts[3:6]]
    expected = optjax.score(params, prompts, ends)
    found = optjax.score(params, iter(prompts), (end for end in ends))  # pyright: ignore
    assert [score.logprob for score in found] == [score.logprob for score in expected]


def test_sums_to_one(pair):
    """All continuations of one token, whose probabilities are one together, and what sampling would give."""
    _, params = pair
    scores = optjax.score(params, [[5, 6, 7]] * V, [[i] for i in range(V)], batch_size=32)
    p = np.exp([score.logprob for score in scores])
    assert abs(p.sum() - 1) < 1e-5 and sum(score.is_greedy for score in scores) == 1


def test_second_call_compiles_nothing(pair, texts):
    """Other texts, lengths, kinds of lists and numbers of texts of the same buckets."""
    _, params = pair
    long, short = [t for t in texts if 17 <= len(t) <= 32], [t for t in texts if len(t) <= 16]
    optjax.score(params, long[:4] + short[:4], batch_size=4, top_logprobs=2)
    with count_compilations() as count:
        optjax.score(
            params, [t.tolist() for t in short[5:8]] + [tuple(t) for t in long[5:9]], batch_size=4, top_logprobs=2
        )
        optjax.score(params, [t.astype(np.uint8) for t in short[:3]], batch_size=4, top_logprobs=2)
    assert count.compiled == 0


def test_logits_of_a_whole_text_are_never_there(pair):
    """Of 512 columns only 16 have logits at a time; and of a continuation, only its own columns."""
    from optjax.scoring import _score

    params = optjax.abstract_params(CONFIG.replace(max_position_embeddings=512))
    arguments = np.zeros((2, 512), np.int32), np.ones((2, 512), bool)
    for window in (512, 32):
        text = str(jax.make_jaxpr(lambda *a, window=window: _score(*a, window=window, top=0))(params, *arguments))
        assert f"f32[2,16,{V}]" in text
        assert f"f32[2,512,{V}]" not in text and f"f32[{window // 16},2,16,{V}]" not in text


def test_stacked_and_half_precision(pair, texts):
    _, params = pair
    usual = [score.logprob for score in optjax.score(params, texts[:8])]
    stacked = optjax.stack_layers(params)
    assert_close([score.logprob for score in optjax.score(stacked, texts[:8])], usual)
    half = jax.tree.map(lambda w: w.astype("bfloat16"), params)
    assert_close([score.logprob for score in optjax.score(half, texts[:8])], usual, tolerance=0.05)


def test_on_a_mesh(texts):
    from optjax.sharding import make_mesh

    config = CONFIG.replace(vocab_size=48)
    one, many = (
        optjax.init_params(config, jax.random.key(0), mesh=mesh) for mesh in (None, make_mesh("data=2,fsdp=2,tensor=2"))
    )
    expected, found = (optjax.score(params, texts[:8], top_logprobs=2) for params in (one, many))
    assert_close([score.logprob for score in found], [score.logprob for score in expected])


def test_refusals(pair):
    _, params = pair
    headless = optjax.init_params(CONFIG, jax.random.key(0), head=None)
    with count_compilations() as count:
        for arguments, options, part in (
            (([[5, 47]],), {}, "outside the vocabulary: 0 to 46"),
            (([[5], []],), {}, r"prompts\[1\] is empty"),
            (([[5]], [[]]), {}, r"continuations\[0\] is empty"),
            (([[5], [6]], [[7]]), {}, "2 prompts and 1 continuations"),
            (([5, 6],), {}, r"prompts\[0\] should be a list of ids, got shape \(\)"),
            (([[1, [2]]],), {}, r"prompts\[0\] should be a list of ids, got \[1, \[2\]\]"),
            ((["text"],), {}, r"prompts\[0\] should be a list of ids, got 'text'"),
            (("text",), {}, "expected a list of lists of ids, got str"),
            (([[1.5]],), {}, "should be integers"),
            (([[5] * 60], [[6] * 5]), {}, "text 0 has 65 tokens, more than max_position_embeddings = 64"),
            (([[5]],), {"top_logprobs": 48}, "top_logprobs should be an integer from 0 to 47, not 48"),
            (([[5]],), {"top_logprobs": True}, "top_logprobs should be"),
            (([[5]],), {"batch_size": 0}, "batch_size should be an integer at least 1, not 0"),
        ):
            with pytest.raises(ValueError, match=part):
                optjax.score(params, *arguments, **options)
        with pytest.raises(ValueError, match="causal_lm"):
            optjax.score(headless, [[5]])
    assert count.compiled == 0
    assert optjax.score(params, []) == []
