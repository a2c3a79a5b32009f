"""When the watcher calls a run diverged, and when not: on made-up losses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from optjax.train.divergence import Memory, Spikes, observe, remembered, rolled_back

NOTHING = Memory()
SPIKES = Spikes(window=40, least=10, patience=3, max_skipped=4, lower_after=2, memory=200)


def steps(losses, norms=None, **more):
    norms = np.ones(len(losses)) if norms is None else norms
    return [{"loss": loss, "grad_norm": norm, **more} for loss, norm in zip(losses, norms, strict=True)]


def watch(records, memory=NOTHING, first=1, spikes=SPIKES):
    """The first event, and the memory then."""
    for step, metrics in enumerate(records, first):
        memory, event = observe(spikes, memory, step, metrics)
        # What a checkpoint would hold is all there is.
        memory = remembered(json.loads(json.dumps(dataclasses.asdict(memory))))
        if event is not None:
            return memory, event
    return memory, None


def noisy(count, level=3.0, seed=0):
    return level + 0.05 * np.random.default_rng(seed).standard_normal(count)


@pytest.mark.parametrize(
    "losses, expected",
    [
        (noisy(400), None),
        (np.concatenate([noisy(50), [30.0, 30.0], noisy(50)]), None),  # two strange batches
        (np.linspace(11.0, 2.5, 300), None),  # learning
        (np.concatenate([noisy(20), np.tile([9.0, 3.0], 20), np.full(3, 5.0)]), ("loss spike", 61, 63)),
        (np.concatenate([noisy(50), np.full(9, 4.0)]), ("loss spike", 51, 53)),
        (np.concatenate([noisy(50), np.linspace(3.0, 8.0, 40)]), ("loss spike", None, None)),  # slowly
        (np.concatenate([noisy(6), np.full(3, 9.0)]), None),  # too early to tell
        (np.concatenate([np.full(50, 0.001), np.full(9, 0.05)]), None),  # many times as much, and nothing
        (np.concatenate([noisy(20), np.full(4, np.nan)]), ("not finite", 21, 24)),
        (np.concatenate([noisy(20), [np.nan] * 3, noisy(9), [np.inf] * 3, noisy(9)]), None),
    ],
)
def test_what_is_an_event(losses, expected):
    _, event = watch(steps(losses))
    if expected is None:
        assert event is None
    else:
        kind, first, step = expected
        assert event is not None and event.kind == kind
        assert first is None or (event.first, event.step) == (first, step)


def test_gradient_norms_spike_on_a_scale_of_factors():
    norms = np.exp(0.2 * np.random.default_rng(1).standard_normal(60))
    _, event = watch(steps(noisy(60), np.concatenate([norms[:50], np.full(10, 3.0)])))
    assert event is None
    _, event = watch(steps(noisy(60), np.concatenate([norms[:50], np.full(10, 8.0)])))
    assert event is not None and (event.kind, event.first, event.step) == ("gradient spike", 51, 53)
    assert 0.7 < event.usual < 1.4 and event.value == pytest.approx(8.0)


def test_a_loss_scale_may_look_for_its_place():
    """Gradients that overflow at a scale above 1 are no divergence; at a scale of 1 they are, and a loss of NaN is."""
    overflow = {"loss": 3.0, "grad_norm": np.inf, "skipped": 1}
    assert watch([overflow | {"loss_scale": 1024.0}] * 30)[1] is None
    assert watch([overflow | {"loss_scale": 1.0}] * 30)[1].kind == "not finite"
    assert watch([overflow | {"loss_scale": 1024.0, "loss": np.nan}] * 30)[1].kind == "not finite"


def test_repeated_events_lower_the_learning_rate_and_old_ones_are_forgotten():
    bad = steps(np.full(5, 9.0))
    memory, event = watch(steps(noisy(30)) + bad)
    saved = watch(steps(noisy(20)))[0]
    assert (event.number, event.lr_scale) == (1, 1.0)
    memory = rolled_back(memory, saved)
    assert (memory.losses, memory.seen) == (saved.losses, 33) and not memory.loss_outliers
    for number, scale in ((2, 0.5), (3, 0.25)):
        memory, event = watch(steps(noisy(10)) + bad, memory, first=21)
        assert (event.number, event.lr_scale) == (number, scale)
        memory = rolled_back(memory, saved)
    memory, event = watch(steps(noisy(300)) + bad, memory, first=21)
    assert (event.number, event.lr_scale) == (4, 0.25)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"least": 200}, {"lr_factor": 0.0}, {"patience": 0}, {"threshold": 0}]
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="should be"):
        Spikes(**wrong)
