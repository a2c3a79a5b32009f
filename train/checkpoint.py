"""Checkpoints of a training run, written by orbax while the run goes on.

A run's folder holds `checkpoints/<step>/`, each with the state, the place in the data and what the loop has to
remember; and `best/`, the one whose validation figure was best, if one is asked for. A checkpoint counts when it is
complete, or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from .barrier import together
from .interrupt import STOPPED
from .sizes import compare_sizes, write_sizes

# Seconds that a process which cannot read a checkpoint waits for the others to say so too, and one which can.
PATIENCE, LONGEST = 60.0, 3600.0


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the state, the loader's (`Loader.set_state`), and the loop's."""

    state: Any
    loader: dict[str, Any]
    loop: dict[str, Any]


class _Manager(ocp.CheckpointManager):
    """orbax's, but it does not ask jax's preemption service, which it would do with the step for a count. The service
    takes the latest count of every process and stops all at the next one: with two ways of counting, the loop's own
    (`Interrupt`) and this, a count may come that no process ever reaches, and the run goes on to its end.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@contextlib.contextmanager
def _no_word_of_reading() -> Iterator[None]:
    """Without the warnings of orbax that a manager which is to read only reads only."""

    def other(record: logging.LogRecord) -> bool:
        return "read_only" not in (text := record.getMessage()) and "read only" not in text

    log = logging.getLogger("absl")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last one and closes them.

    The newest `keep` whose step is a multiple of `every` stay, and the newest of all: where a run was stopped by hand,
    which changes nothing of what it goes back to later. ``read_only`` leaves all as it is, a save under way of the run
    that the folder belongs to included.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        every: int = 1,
        say: Callable[[str], None] = print,
        name: str = "",
        read_only: bool = False,
    ):
        self.folder = Path(folder).absolute()
        self._path = self.folder / (name or "checkpoints")
        self.say, self._read_only = say, read_only
        with _no_word_of_reading():
            options = ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=_Regular(keep, every),
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name or None),
            )
            self._manager = _Manager(self._path, options=options)
        self._unsized: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Those of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return max(self.steps, default=None)

    def save(self, state: Any, loader: dict[str, Any] | None = None, loop: dict[str, Any] | None = None) -> None:
        """Begins to save a state under its step, and returns as soon as the state's buffers may be given away; a step
        that is there already is left as it is.

        Raises:
          OSError, ValueError: this save, or the one before it, did not get through; what was saved earlier is intact.
        """
        step = int(state.step)
        self.wait()
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            loader=ocp.args.JsonSave(loader or {}),
            loop=ocp.args.JsonSave(loop or {}),
        )
        self._manager.save(step, args=args, force=True)
        self._unsized = step

    def replace(self, state: Any, loader: dict[str, Any], loop: dict[str, Any]) -> None:
        """`save`, in place of checkpoints of that step and of later ones, which a rollback may have left."""
        for step in reversed(self.steps):
            if step >= int(state.step):
                self._manager.delete(step)
        self.save(state, loader, loop)

    def wait(self) -> bool:
        """Until the checkpoint being saved is complete; whether there was one. Raises as `save`."""
        saving, self._unsized = self._unsized, None
        self._manager.wait_until_finished()
        if saving is not None:
            write_sizes(self._path / str(saving))
        return saving is not None

    def sweep(self) -> None:
        """Removes what saves that did not get through left behind, which a full disk has no room for."""
        if jax.process_count() == 1:  # of several, others may still be writing
            for unfinished in self._path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def restore(self, target: Any) -> Any:
        """The newest state, each array made where the target's shardings say; see `resume`."""
        return self.resume(target).state

    def resume(self, target: Any, steps: Sequence[int] | None = None) -> Restored:
        """The newest checkpoint that can be read (of those of some steps). Newer, damaged ones are reported, and moved
        to the run's folder `damaged` unless all is to be left as it is.

        Of several processes one may fail while the others wait for it inside of orbax. It says so then, and ends the
        run: where the files are to blame, and there is a checkpoint before, it moves this one and ends with status 75,
        so that all go on from the one before when they are started again; else with status 1.

        Args:
          target: the state as `jax.ShapeDtypeStruct` with shardings; its mesh, rules and number of processes need not
            be those that the state was saved with.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: none can be read.
        """
        candidates = self.steps if steps is None else [step for step in self.steps if step in set(steps)]
        if not candidates:
            raise FileNotFoundError(f"no checkpoint in {self._path}")
        reasons = {}
        for step in reversed(candidates):
            reason, restored = self._read(step, target)
            if restored is not None:
                for damaged, why in reasons.items():
                    self.say(f"the checkpoint of step {damaged} is damaged ({why}); going on from step {step}")
                    if not self._read_only:
                        self._set_aside(damaged)
                return restored
            reasons[step] = reason
        listed = "; ".join(f"step {step}: {why}" for step, why in reasons.items())
        raise ValueError(f"no checkpoint in {self._path} can be read: {listed}")

    def remove(self, step: int) -> None:
        """Removes the checkpoint of a step."""
        self._manager.delete(step)

    def _read(self, step: int, target: Any) -> tuple[str, Restored | None]:
        wrong = compare_sizes(self._path / str(step))
        if wrong:
            return wrong, None
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), loader=ocp.args.JsonRestore(), loop=ocp.args.JsonRestore()
        )
        found: Any = None
        wrong, damaged = "", False
        try:
            found = self._manager.restore(step, args=args)
        except Exception as error:  # orbax and tensorstore raise all kinds
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            # What jax and the system raise may be the memory's, the network's or another process's fault.
            damaged = not isinstance(error, jax.errors.JaxRuntimeError | OSError | MemoryError)
        if jax.process_count() > 1:
            if not _all_have_read(step, PATIENCE if wrong else LONGEST):
                self._give_up(step, wrong or "another process has not", damaged)
            if not multihost_utils.process_allgather(np.array(not wrong)).all():
                return wrong or "another process cannot read it", None
        return wrong, found and Restored(found["state"], found["loader"], found["loop"])

    def _give_up(self, step: int, why: str, damaged: bool) -> NoReturn:
        if damaged and not self._read_only and any(each < step for each in self.steps):
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                self._move(step)
            text = f"the checkpoint of step {step} is damaged ({why}); the same command goes on from the one before"
            status = STOPPED
        else:
            text = f"not every process can read the checkpoint of step {step} in {self._path} ({why})"
            status = 1
        print(text, file=sys.stderr, flush=True)
        os._exit(status)  # an orderly end would wait for the others

    def _move(self, step: int) -> None:
        target, again = self.folder / "damaged" / str(step), itertools.count(1)
        target.parent.mkdir(exist_ok=True)
        while target.exists():  # of an earlier time, or by another process just now
            target = target.with_name(f"{step}.{next(again)}")
        (self._path / str(step)).rename(target)

    def _set_aside(self, step: int) -> None:
        together(f"checkpoint {step} is damaged")
        if jax.process_index() == 0:
            self._move(step)
        together(f"checkpoint {step} is set aside")
        self._manager.reload()


class _Regular:
    """Which checkpoints stay: the newest `keep` of those at multiples of `every`, and the newest."""

    def __init__(self, keep: int, every: int):
        self.keep, self.every = keep, every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [each.step for each in checkpoints]
        regular = sorted(step for step in steps if step % self.every == 0)
        kept = {*regular[-self.keep :], max(steps, default=0)}
        return [step in kept for step in steps]


def _all_have_read(step: int, seconds: float) -> bool:
    """Whether every process has come out of reading a checkpoint, with or without it, within that time."""
    try:
        together(f"the checkpoint of step {step} is read", seconds)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def restore_best(folder: str | Path, target: Any) -> Restored | None:
    """The checkpoint whose validation figure was best; its figures are in `loop`. None: no figure was asked for yet."""
    if not (Path(folder) / "best").is_dir():
        return None
    with Checkpoints(folder, keep=1, name="best", read_only=True) as best:
        return best.resume(target) if best.steps else None
