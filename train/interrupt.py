"""Signals that ask a run to stop: noted, and agreed upon by all processes, so that it can save first."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils

# The exit status of a script whose run was told to stop and has saved: EX_TEMPFAIL of sysexits.h, try again.
STOPPED = 75


class Interrupt:
    """Notes SIGTERM, SIGINT and SIGHUP (the terminal or the ssh went away; not where it is ignored, as under nohup)
    instead of dying of them; a second SIGINT is a KeyboardInterrupt as usual.

    Of several processes one may get the signal (a machine is to be taken away): jax's preemption service tells the
    others and finds the step at which all stop.
    """

    def __init__(self):
        self._signalled = self._agreed = False
        self._asked = 0
        self._before: dict[int, object] = {}

    def received(self) -> bool:
        """Whether to stop, from the step on at which all do. To be asked once after every step, by every process."""
        if jax.process_count() == 1:
            return self._signalled
        self._asked += 1
        # The service says so at one step only, whose answer a rollback may pass over.
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def __enter__(self) -> Interrupt:
        # Of several processes, each has the service's own handler of SIGTERM.
        numbers = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
        if jax.process_count() > 1:
            numbers -= {signal.SIGTERM}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers -= {signal.SIGHUP}
        try:
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        except ValueError:  # not the main thread: signals are somebody else's business
            self._before = {}
        return self

    def _note(self, number: int, _frame: object) -> None:
        self._signalled = True
        if number == signal.SIGINT and number in self._before:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
