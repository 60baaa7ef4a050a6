"""Times calls on a GPU, whose work goes on after a call returns.

Before every timed call a buffer of several times the L2 cache is read, so that a call finds nothing of its
own there; while that runs, the host queues the call, so that gaps between its launches do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from timer import Timing
from torch import Tensor

LEAST_FLUSH = 1 << 28  # bytes


class GpuTimer:
    """Seconds by the device's own clock; on the CPU, where it serves to try things out, the host's."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffer: Tensor | None = None
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._buffer = torch.zeros(max(4 * cache, LEAST_FLUSH) // 4, device=self.device)

    def measure(self, call: Callable[[], object], *, seconds: float, least: int = 5) -> Timing:
        """Times `call` for about `seconds`, at least `least` times, after two calls that are not counted."""
        for _ in range(2):
            call()
        self.synchronize()
        begin, seen = time.perf_counter(), list[float]()
        while len(seen) < least or time.perf_counter() - begin < seconds:
            seen.append(self._once(call))
        return Timing(statistics.median(seen), min(seen), max(seen), len(seen))

    def measure_host(self, call: Callable[[], object], *, seconds: float, calls: int = 20) -> Timing:
        """Seconds a call as the host sees them, of `calls` calls one after the other and a final wait."""

        def batch() -> float:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            self.synchronize()
            return (time.perf_counter() - begin) / calls

        batch()
        begin, seen = time.perf_counter(), list[float]()
        while len(seen) < 5 or time.perf_counter() - begin < seconds:
            seen.append(batch())
        return Timing(statistics.median(seen), min(seen), max(seen), len(seen) * calls)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _once(self, call: Callable[[], object]) -> float:
        if self._buffer is None:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._buffer.amax()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
