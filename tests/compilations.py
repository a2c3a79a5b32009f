"""How many programs jax compiles in a block of code, and how a program is compiled whose text or memory counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax.monitoring

# What conftest.py turns off to save time, and changes what XLA puts into one loop; for `Lowered.compile`.
AS_USERS_DO = {"xla_cpu_use_fusion_emitters": True}

_events: list[str] = []


def _listen(event: str, duration: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _events.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


class Count:
    compiled: int = 0


@contextlib.contextmanager
def count_compilations() -> Iterator[Count]:
    """Yields a `Count` whose ``compiled`` is set when the block ends."""
    before, count = len(_events), Count()
    yield count
    count.compiled = len(_events) - before
