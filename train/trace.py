"""A profiler trace of some steps, for TensorBoard's profile plugin, XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces ``(first, count)`` steps into a folder; a run that begins later traces nothing."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._running = folder, steps, False

    def before(self, step: int) -> None:
        """To be called before a step is handed to the device."""
        if self._steps is not None and step == self._steps[0] and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: dict[str, Any]) -> None:
        """To be called after it; waits for the last of the traced steps."""
        if self._running and self._steps is not None and step >= sum(self._steps) - 1:
            jax.block_until_ready(metrics)
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._steps = False, None
