"""The sampling options beside transformers' LogitsWarper classes, on the same logits: what is kept, and its score."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from generation_helpers import CONFIG, make_pair, pad, random_prompts
from hf_models import assert_close
from transformers.generation import logits_process as hf

import optjax
from optjax.generation import thresholds
from optjax.generation.history import new_history
from optjax.generation.processors import process
from optjax.generation.settings import as_settings
from optjax.generation.thresholds import kth_largest, mass_threshold

OFF = {"top_k": 0}


def rows_of_all_kinds() -> dict[str, np.ndarray]:
    """Logits ``[B, V]`` by kind."""
    rng = np.random.default_rng(0)
    plain = (rng.standard_normal((120, 53)) * rng.uniform(0.1, 8, size=(120, 1))).astype(np.float32)
    holed = np.where(rng.random(plain.shape) < rng.uniform(0, 0.95, size=(120, 1)), -np.inf, plain)
    holed[:, 7] = plain[:, 7]  # something is left in every row
    large = (plain * 10.0 ** rng.integers(0, 5, size=(120, 1))).astype(np.float32)
    small = (plain * 10.0 ** rng.integers(-8, 0, size=(120, 1))).astype(np.float32)
    far = plain.copy()
    far[:, :5] -= 1e4
    far[:60, 9] += 200
    return {"plain": plain, "holed": holed, "large": large, "small": small, "far": far}


def tied_rows() -> np.ndarray:
    """Few values, each many times; rows of one value only; zeros of both signs."""
    rng = np.random.default_rng(1)
    tied = rng.integers(-3, 3, size=(60, 53)).astype(np.float32)
    tied[:5] = 2.5
    tied[5:10] = np.where(rng.random((5, 53)) < 0.5, 0.0, -0.0)
    return tied


def ours(logits: np.ndarray, **options) -> np.ndarray:
    config = CONFIG.replace(vocab_size=logits.shape[1])
    settings = as_settings(config, OFF | options | {"do_sample": True})
    ids = np.zeros((len(logits), 1), np.int32)
    history = new_history(ids, ids == 0, 1, config.vocab_size, settings)
    return np.asarray(_process(settings, history, logits))


_process = jax.jit(process)


def theirs(warper, logits: np.ndarray) -> np.ndarray:
    return warper(torch.zeros((len(logits), 1), dtype=torch.long), torch.from_numpy(logits)).numpy()


WARPERS = {
    "temperature": (hf.TemperatureLogitsWarper, [0.1, 0.7, 1.7, 50.0]),
    "top_k": (hf.TopKLogitsWarper, [1, 2, 10, 52, 53, 54, 10_000]),
    "top_p": (hf.TopPLogitsWarper, [1e-4, 0.1, 0.5, 0.9, 0.99]),
    "min_p": (hf.MinPLogitsWarper, [0.0, 0.003, 0.1, 0.5, 1.0]),
    "typical_p": (hf.TypicalLogitsWarper, [1e-4, 0.2, 0.5, 0.9, 0.99]),
    "epsilon_cutoff": (hf.EpsilonLogitsWarper, [1e-4, 0.02, 0.3, 0.99]),
    "eta_cutoff": (hf.EtaLogitsWarper, [1e-4, 0.02, 0.3, 0.99]),
}
CASES = [(name, value) for name, (_, values) in WARPERS.items() for value in values]


@pytest.mark.parametrize("option, value", CASES)
def test_same_as_transformers(option, value):
    """Exactly the same tokens kept, with exactly the same scores."""
    for kind, logits in rows_of_all_kinds().items():
        if option in ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff") and kind == "small":
            continue  # all equally probable but for rounding, which differs
        mine, other = ours(logits, **{option: value}), theirs(WARPERS[option][0](value), logits)
        kept = np.isfinite(mine)
        np.testing.assert_array_equal(kept, np.isfinite(other), err_msg=kind)
        assert kept.any(1).all(), kind
        if option == "temperature":
            np.testing.assert_allclose(mine[kept], other[kept], rtol=2e-7, err_msg=kind)
        else:
            np.testing.assert_array_equal(mine[kept], logits[kept], err_msg=kind)


@pytest.mark.parametrize("option, value", [case for case in CASES if case[0] in ("top_k", "min_p", "epsilon_cutoff")])
def test_ties_as_transformers(option, value):
    logits = tied_rows()
    kept = np.isfinite(ours(logits, **{option: value}))
    np.testing.assert_array_equal(kept, np.isfinite(theirs(WARPERS[option][0](value), logits)))


@pytest.mark.parametrize("option, value", [case for case in CASES if case[0] in ("top_p", "typical_p")])
def test_ties_stay_together(option, value):
    """Where transformers' sort splits equal scores by their place in the vocabulary, ours keeps all of them.

    So ours are transformers' tokens, and those that score as the least of them.
    """
    logits = tied_rows()
    kept = np.isfinite(ours(logits, **{option: value}))
    other = np.isfinite(theirs(WARPERS[option][0](value), logits))
    values = [set(row[chosen]) for row, chosen in zip(logits, other, strict=True)]
    completed = np.array([[score in chosen for score in row] for row, chosen in zip(logits, values, strict=True)])
    np.testing.assert_array_equal(kept, completed)
    if option == "top_p":
        assert (kept & ~other).any(), "no row where it makes a difference"


def test_one_token_is_kept_even_when_hardly_anything_is_asked_for():
    logits = np.concatenate([*rows_of_all_kinds().values()])
    best = logits == logits.max(1, keepdims=True)
    for option in ("top_p", "typical_p"):
        for value in (1e-45, 1e-38, 1e-20):
            kept = np.isfinite(ours(logits, **{option: value}))
            assert kept.any(1).all()
            if option == "top_p":
                np.testing.assert_array_equal(kept, best)


def test_order_and_history_as_transformers():
    """A whole sampled generation: the scores of each step are transformers' processors applied to its torch logits."""
    model, params = make_pair(CONFIG, seed=3)
    rng = np.random.default_rng(4)
    prompts = random_prompts(rng, 12, CONFIG.vocab_size, 10)
    ids, mask = pad(prompts, "holes", rng, CONFIG.vocab_size)
    options = dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.8, repetition_penalty=1.2)
    options |= dict(epsilon_cutoff=0.01, eta_cutoff=0.05, renormalize_logits=True)
    out = optjax.generate(
        params, ids, mask, max_new_tokens=8, do_sample=True, key=jax.random.key(0), eos_token_id=[],
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    assert out.scores is not None
    chain = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.TemperatureLogitsWarper(1.5),
            hf.TopKLogitsWarper(20),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.01),
            hf.TypicalLogitsWarper(0.8),
            hf.EpsilonLogitsWarper(0.01),
            hf.EtaLogitsWarper(0.05),
            hf.LogitNormalization(),
        ]
    )
    new = np.asarray(out.sequences)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        for step in range(8):
            so_far = torch.from_numpy(np.concatenate([prompt, new[row, :step]]))[None]
            with torch.no_grad():
                expected = chain(so_far, model(so_far).logits[:, -1]).numpy()[0]
            scores = np.asarray(out.scores)[row, step]
            kept = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(scores), kept)
            assert_close(scores[kept], expected[kept])
            assert kept[new[row, step]], "a token was drawn that had been excluded"
            logprob = expected[new[row, step]] - np.log(np.exp(expected[kept].astype(np.float64)).sum())
            assert abs(float(out.logprobs[row, step]) - logprob) < 1e-4


@pytest.mark.parametrize("v", [1, 63, 50272])
def test_thresholds_are_exact(v):
    """The k-th largest is numpy's; the mass threshold is right to the rounding of a sum in float32."""
    rng = np.random.default_rng(v)
    x = (rng.standard_normal((4, v)) * 5).astype(np.float32)
    x[1] = np.round(x[1])
    x[2, 1:][rng.random(v - 1) < 0.7] = -np.inf
    for k in {1, 2, 50, v // 2, v} - {0}:
        if k <= v:
            expected = np.sort(x, axis=1)[:, [v - k]]
            np.testing.assert_array_equal(np.asarray(_kth_largest(x, np.int32(k))), expected)
    p = np.asarray(jax.nn.softmax(x, axis=-1))
    for mass in (0.01, 0.5, 0.9, 0.999):
        threshold = np.asarray(_mass_threshold(p, p, np.float32(mass)))
        exact = p.astype(np.float64)
        at_least = np.where(p >= threshold, exact, 0).sum(1)
        above = np.where(p > threshold, exact, 0).sum(1)
        assert (at_least >= mass - 1e-6).all() and (above < mass + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("v", [1, 511, 50272])
def test_thresholds_by_several_bits_are_those_by_one(v, bits):
    """As on TPU and GPU; of a mass in whole numbers, whose sums are exact in any order."""
    rng = np.random.default_rng(v)
    x = (rng.standard_normal((4, v)) * 5).astype(np.float32)
    x[1] = np.round(x[1])
    x[2, 1:][rng.random(v - 1) < 0.7] = -np.inf
    x[3] = rng.choice([0.0, -0.0, 1e-30, -1e-30, np.inf, -np.inf], v)
    ordered, p = thresholds._to_ordered(jnp.asarray(x)), rng.integers(0, 9, (4, v)).astype(np.float32)
    ours, by_bits = jax.jit(partial(thresholds._by_digits, bits)), jax.jit(thresholds._by_bits)
    for weights, total in ((None, v), (p, int(p.sum(1).min()))):
        for least in {1, 2, 50, total // 2, total, total + 1}:
            least = np.asarray(least, np.int32 if weights is None else np.float32)
            np.testing.assert_array_equal(ours(ordered, weights, least), by_bits(ordered, weights, least))


def test_thresholds_step_by_step():
    """As `jax.disable_jit` has them, where a loop counts in Python's numbers."""
    x = rows_of_all_kinds()["plain"][:5]
    p = np.asarray(jax.nn.softmax(x, axis=-1))
    with jax.disable_jit():
        kth, mass = kth_largest(x, np.int32(7)), mass_threshold(p, p, np.float32(0.9))
    np.testing.assert_array_equal(kth, _kth_largest(x, np.int32(7)))
    np.testing.assert_array_equal(mass, _mass_threshold(p, p, np.float32(0.9)))


_kth_largest, _mass_threshold = jax.jit(kth_largest), jax.jit(mass_threshold)
