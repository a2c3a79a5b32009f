"""The training loop, on a small job of its own: what it logs, saves, decides and survives."""

from __future__ import annotations

import jax
import numpy as np
from loop_job import make_job, options

from optjax.train.log import read_events, read_log
from optjax.train.loop import run


def leaves(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same(one, other) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def figures(folder) -> list[tuple]:
    """What of a log is the same for the same run."""
    return [(e["step"], e["loss"], e["grad_norm"], e["lr"]) for e in read_log(folder, everything=True)]


def test_a_run_in_parts_is_the_run_in_one(tmp_path):
    """Stopped off and on the grid of checkpoints and log; the entries are the same too."""
    whole = run(make_job(), tmp_path / "whole", options())
    for stop in (3, 8, 9, None):
        parts = run(make_job(), tmp_path / "parts", options(stop_at=stop))
        assert int(parts.step) == (stop or 12)
    assert_same(whole, parts)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert [entry[0] for entry in figures(tmp_path / "parts")] == [2, 4, 6, 8, 10, 12]
    assert not read_events(tmp_path / "parts")
