"""How fast a run goes: tokens a second, the share of the device's peak, and its memory."""

from __future__ import annotations

import time

import jax

from optjax.sharding.plan.here import chip_here


class Meter:
    """Steps and seconds between entries of the log; what compiles, validates or waits for a disk is left out.

    Args:
      tokens_per_step: of all devices.
      flops_per_step: of all devices, or None.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float | None):
        self._tokens, self._flops = tokens_per_step, flops_per_step
        chip = chip_here()
        self._peak = chip.flops * jax.device_count() if chip else None
        self._mark: tuple[int, float] | None = None

    @property
    def started(self) -> bool:
        return self._mark is not None

    def start(self, step: int) -> None:
        """Counts from here: `step` is finished, and the device at no other or just at the beginning of one."""
        self._mark = (step, time.perf_counter())

    def read(self, step: int) -> dict[str, float]:
        """Figures of the steps up to `step`, which was just finished, since the last reading."""
        entry: dict[str, float] = {}
        now = time.perf_counter()
        if self._mark is not None and step > self._mark[0]:
            seconds = (now - self._mark[1]) / (step - self._mark[0])
            entry = {"tokens_per_second": self._tokens / seconds, "seconds_per_step": seconds}
            if self._flops and self._peak:
                entry["mfu"] = self._flops / seconds / self._peak
            self._mark = (step, now)
        entry["time"] = round(time.time(), 3)
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            entry["memory"] = stats["peak_bytes_in_use"]
        return entry
