"""Killed at the worst moments, a run ends in the same bits; `python tests/kills.py` does it at 25 random ones."""

from __future__ import annotations

import shutil
import signal
import time

import pytest
from kills import finish, finished, output, same, start

from optjax.train.interrupt import STOPPED
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


def test_damage_that_one_process_finds(tmp_path):
    """The other waits for it inside of orbax. It says so, and started again both go on from the checkpoint before. The
    last one is not moved, so that the run does not begin anew."""
    options, more, folder = OPTIONS | {"total_steps": 12}, {"width": 4096}, tmp_path / "run"
    assert finish(start(folder, options | {"stop_at": 8}, more, 2)) == [0, 0], output(folder)
    kept = tmp_path / "kept"
    shutil.copytree(folder / "checkpoints" / "4", kept)
    for step, status, said in ((8, STOPPED, "step 8 is damaged"), (4, 1, "not every process can read")):
        for path in (folder / f"checkpoints/{step}/state/ocdbt.process_1/d").iterdir():
            path.write_bytes(bytes(path.stat().st_size))  # as long as it was: no size tells
        (folder / f"checkpoints/{step}/sizes.json").unlink()  # nor a checksum, of which larger files have none
        started = start(folder, options, more | {"patience": 2.0}, 2)
        deadline = time.monotonic() + 120.0
        while all(process.poll() is None for process in started) and time.monotonic() < deadline:
            time.sleep(0.05)
        first = [process.poll() for process in started]
        for process in started:
            process.kill()
            process.wait()
        assert status in first and said in output(folder), (first, output(folder))
    assert [path.name for path in (folder / "damaged").iterdir()] == ["8"]
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.copytree(kept, folder / "checkpoints" / "4")
    whole = finished(tmp_path / "whole", options, more, 2)
    assert same(finished(folder, options, more, 2), whole), output(folder)
