"""Killed at the worst moments, a run ends in the same bits; `python tests/kills.py` does it at 25 random ones."""

from __future__ import annotations

import signal

import pytest
from kills import finish, finished, output, same, start

from optjax.train.log import read_events

OPTIONS = {"total_steps": 16, "save_every": 4, "log_every": 2, "eval_every": 8}
# A spike, so that what was killed has to roll back as well: steps 10 to 13, back to step 8.
MORE = {"plant": {str(n): 30.0 for n in range(9, 13)}}
SAVING = "checkpoints/{}.*tmp*"


@pytest.mark.parametrize(
    "processes, deaths",
    [
        (
            1,
            [
                {"signal": signal.SIGKILL, "exists": SAVING.format(4)},
                {"signal": signal.SIGKILL, "step": 7},
                {"signal": signal.SIGTERM, "exists": SAVING.format(8)},
                {"signal": signal.SIGKILL, "exists": SAVING.format(12)},
            ],
        ),
        (
            2,
            [
                {"signal": signal.SIGKILL, "exists": SAVING.format(8), "process": 1},
                {"signal": signal.SIGTERM, "step": 5, "process": 1},
            ],
        ),
    ],
)
def test_kills_change_no_bit(tmp_path, processes, deaths):
    options = OPTIONS | {"total_steps": 16 * processes}
    whole = finished(tmp_path / "whole", options, MORE, processes)
    folder = tmp_path / "killed"
    for death in deaths:
        codes = finish(start(folder, options, MORE | {"death": death}, processes))
        expected = 0 if death["signal"] == signal.SIGTERM else -signal.SIGKILL
        assert set(codes) == {expected}, (codes, output(folder))
        assert not (folder / "final.npz").exists()
    assert same(finished(folder, options, MORE, processes), whole), output(folder)
    for each in ("whole", "killed"):
        assert [event["back_to"] for event in read_events(tmp_path / each)] == [8]
