"""Waiting for the other processes of a run."""

from __future__ import annotations

import itertools

import jax
import orbax.checkpoint as ocp

WEEK = 7 * 24 * 3600.0

# jax's service takes a barrier's name once. The same on every process: they come to the same barriers in turn.
_number = itertools.count()


def together(what: str, seconds: float = WEEK) -> None:
    """Waits until every process has come here.

    Not at the devices: where one process has failed the others may wait for it there, and on a CPU for no longer than
    half a minute.

    Raises:
      jax.errors.JaxRuntimeError: one has not within that time, or is gone.
    """
    if jax.process_count() > 1:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"optjax: {what}, {next(_number)}", timeout_ms=int(1000 * seconds))
