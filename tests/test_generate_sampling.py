"""Sampling: what is drawn follows the processed distribution, a row minds its own key, and streaming is the same."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from generation_helpers import CONFIG, make_pair, pad, random_prompts
from scipy import stats
from transformers.generation import logits_process as hf

import optjax
from optjax.generation.draw import draw, most_probable

V = CONFIG.vocab_size
PROMPT = [5, 40, 17, 3, 8]
DRAWS = 4096

# Settings that leave all but nothing out: with every warper in the program, numbers alone tell the cases apart, and one
# compilation serves them all.
NEUTRAL = dict(temperature=0.9999999, top_k=V, top_p=0.9999999, min_p=0.0, typical_p=0.9999999)
NEUTRAL |= dict(epsilon_cutoff=1e-9, eta_cutoff=1e-9)
CASES = {
    "neutral": {},
    "temperature": dict(temperature=0.6),
    "hot": dict(temperature=3.0),
    "top_k": dict(top_k=4),
    "top_p": dict(top_p=0.7),
    "min_p": dict(min_p=0.05),
    "typical_p": dict(typical_p=0.6),
    "epsilon_cutoff": dict(epsilon_cutoff=0.03),
    "eta_cutoff": dict(eta_cutoff=0.1),
    "all": dict(temperature=1.8, top_k=12, top_p=0.9, min_p=0.02, typical_p=0.95, eta_cutoff=0.001),
}


@pytest.fixture(scope="module")
def pair():
    return make_pair(CONFIG, seed=0)


def distribution(model, options) -> np.ndarray:
    """The next token's exact probabilities, by torch in float64 and transformers' warpers."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[:, -1].double()
    options = NEUTRAL | options
    chain = [
        hf.TemperatureLogitsWarper(options["temperature"]),
        hf.TopKLogitsWarper(options["top_k"]),
        hf.TopPLogitsWarper(options["top_p"]),
        hf.MinPLogitsWarper(options["min_p"]),
        hf.TypicalLogitsWarper(options["typical_p"]),
        hf.EpsilonLogitsWarper(options["epsilon_cutoff"]),
        hf.EtaLogitsWarper(options["eta_cutoff"]),
    ]
    for warper in chain:
        logits = warper(torch.zeros((1, 1), dtype=torch.long), logits)
    return torch.softmax(logits, -1)[0].numpy()


def goodness(counts: np.ndarray, p: np.ndarray) -> float:
    """The p-value of a chi-square test, the rare tokens together."""
    expected = p * counts.sum()
    often = expected >= 8
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    if expected[-1] < 1e-3:
        assert observed[-1] == 0, "tokens were drawn that should be left out"
        observed, expected = observed[:-1], expected[:-1]
    return float(stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue)


def counted(params, seed: int, options) -> np.ndarray:
    ids = np.tile(PROMPT, (DRAWS, 1))
    out = optjax.generate(
        params, ids, max_new_tokens=1, do_sample=True, key=jax.random.key(seed), **(NEUTRAL | options)
    )
    return np.bincount(np.asarray(out)[:, -1], minlength=V)


def test_draws_follow_the_processed_distribution(pair):
    model, params = pair
    for name, options in CASES.items():
        counts = sum(counted(params, seed, options) for seed in range(4))
        p = distribution(model, options)
        assert (counts[p == 0] == 0).all(), name
        assert goodness(counts, p) > 1e-3, name
        # The test tells: the same draws fit no other case's distribution.
        for other, others in CASES.items():
            if other != name:
                q = distribution(model, others)
                assert (counts[q == 0] > 0).any() or goodness(counts, q) < 1e-6, (name, other)


def test_draw_by_itself():
    """Every column of a wide row comes as often as it should; columns without mass never come."""
    rng = np.random.default_rng(0)
    scores = (2 * rng.standard_normal(1500)).astype(np.float32)
    scores[100:800] = -np.inf
    scores[-1] = -np.inf
    keys = jax.random.split(jax.random.key(1), 400_000)
    drawn = jax.jit(lambda keys: jax.lax.map(lambda key: draw(key[None], scores[None])[0], keys, batch_size=4000))(keys)
    counts = np.bincount(np.asarray(drawn), minlength=len(scores))
    p = np.exp(scores.astype(np.float64))
    assert counts[scores == -np.inf].sum() == 0
    assert goodness(counts, p / p.sum()) > 1e-3
    # Runs of neighbours as well: 1500 columns are several blocks, and a wrong edge would shift what lies beyond it.
    groups = np.arange(len(scores)) // 50
    assert goodness(np.bincount(groups, counts), np.bincount(groups, p / p.sum())) > 1e-3


@pytest.mark.parametrize("v", [1, 2, 255, 256, 257, 50272])
def test_draw_of_certain_rows(v):
    """One column has all the mass, wherever it stands; and the largest score is found as numpy finds it."""
    columns = np.unique(np.array([0, v // 2, v - 1]))
    scores = np.full((len(columns), v), -np.inf, np.float32)
    scores[np.arange(len(columns)), columns] = -5.0
    keys = jax.random.split(jax.random.key(0), len(columns))
    np.testing.assert_array_equal(jax.jit(draw)(keys, scores), columns)
    np.testing.assert_array_equal(jax.jit(most_probable)(scores), columns)
    tied = np.random.default_rng(v).integers(0, 3, size=(5, v)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(most_probable)(tied), tied.argmax(1))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return pad(random_prompts(rng, 6, V, 10), "left", rng, V)


SAMPLING = dict(
    do_sample=True, temperature=1.5, top_k=30, top_p=0.95, min_p=0.001, typical_p=0.97, max_new_tokens=9,
    epsilon_cutoff=1e-4, eta_cutoff=1e-3, encoder_repetition_penalty=0.9, encoder_no_repeat_ngram_size=3,
    repetition_penalty=1.1, no_repeat_ngram_size=3, min_new_tokens=2, bad_words_ids=[[4], [5, 6]], suppress_tokens=[9],
    sequence_bias={(7,): -1.0, (8, 9): 2.0}, forced_bos_token_id=12, begin_suppress_tokens=[13],
    exponential_decay_length_penalty=(3, 1.1), renormalize_logits=True, eos_token_id=[2, 20, 33],
)  # fmt: skip


def test_same_key_same_ids_other_key_other_ids(pair, prompts):
    first, again, other = (
        np.asarray(optjax.generate(pair[1], *prompts, key=jax.random.key(seed), **SAMPLING)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(1).mean() > 0.5
    raw = np.asarray(optjax.generate(pair[1], *prompts, key=jax.random.PRNGKey(1), **SAMPLING))
    np.testing.assert_array_equal(first, raw)


def test_stream_yields_what_generate_gives(pair, prompts):
    """With every option on; in a batch whose rows end at different steps, and until the last has ended."""
    ids, mask = prompts
    for seed in range(5):
        key = jax.random.key(seed)
        whole = np.asarray(optjax.generate(pair[1], ids, mask, key=key, num_return_sequences=2, **SAMPLING))
        whole = whole[:, ids.shape[1] :]
        steps = list(optjax.stream(pair[1], ids, mask, key=key, num_return_sequences=2, **SAMPLING))
        assert all(step.shape == (12,) and step.dtype == np.int32 for step in steps)
        np.testing.assert_array_equal(np.stack(steps, axis=1), whole[:, : len(steps)])
        assert (whole[:, len(steps) :] == 1).all()
        ended = np.isin(whole, SAMPLING["eos_token_id"]).any(1)
        assert len(steps) == SAMPLING["max_new_tokens"] or ended.all()


def test_a_row_does_not_depend_on_the_others(pair, prompts):
    """Row 0 keeps its draws whatever its neighbours are, and alone; so does row 3 with other neighbours."""
    ids, mask = prompts
    key = jax.random.key(7)
    batch = np.asarray(optjax.generate(pair[1], ids, mask, key=key, **SAMPLING))
    neighbours = np.random.default_rng(0).integers(0, V, ids.shape)
    neighbours[[0, 3]] = ids[[0, 3]]
    others = np.asarray(optjax.generate(pair[1], neighbours, mask | (neighbours != ids), key=key, **SAMPLING))
    np.testing.assert_array_equal(others[[0, 3]], batch[[0, 3]])
    assert (others != batch).any(1).sum() >= 3
    alone = np.asarray(optjax.generate(pair[1], ids[:1][:, mask[0] == 1], key=key, **SAMPLING))
    new = SAMPLING["max_new_tokens"]
    np.testing.assert_array_equal(alone[0, -new:], batch[0, -new:])


def test_num_return_sequences(pair, prompts):
    """Samples of one prompt differ from each other, and are those of the prompt repeated."""
    ids, mask = prompts
    key = jax.random.key(3)
    out = np.asarray(optjax.generate(pair[1], ids, mask, key=key, num_return_sequences=2, **SAMPLING))
    np.testing.assert_array_equal(out[:, : ids.shape[1]], ids.repeat(2, axis=0))
    assert (out[::2] != out[1::2]).any(1).mean() > 0.5
    repeated = np.asarray(optjax.generate(pair[1], ids.repeat(2, axis=0), mask.repeat(2, axis=0), key=key, **SAMPLING))
    np.testing.assert_array_equal(out, repeated)
    # one prompt, whose cache is laid out differently; and a single sample
    one = np.asarray(optjax.generate(pair[1], ids[:1], mask[:1], key=key, num_return_sequences=3, **SAMPLING))
    np.testing.assert_array_equal(one[:2], out[:2])


def test_sampling_options_do_nothing_without_do_sample(pair, prompts):
    options = dict(temperature=9.0, top_k=1, top_p=0.1, min_p=0.5, typical_p=0.1, eta_cutoff=0.9, key=jax.random.key(0))
    plain = optjax.generate(pair[1], *prompts, max_new_tokens=4)
    same = optjax.generate(pair[1], *prompts, max_new_tokens=4, **options)
    np.testing.assert_array_equal(plain, same)
