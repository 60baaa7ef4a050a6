"""Times calls on a GPU, whose work goes on after a call returns.

Before every timed call the GPU waits for longer than the host takes to queue the call, so that neither the
host's own work nor gaps between launches count; the host's time is a figure of its own. Then a buffer of
several times the L2 cache is read, so that the call finds nothing of its own there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timer import Timing
from torch import Tensor

LEAST_FLUSH = 1 << 28  # bytes
CLOCK = 3e9  # cycles a second; at a lower clock the GPU waits for longer, which does no harm
MARGIN = 1.3  # because the host's time varies
# Seconds. A host that takes longer waits for the GPU itself, and a longer wait would change nothing: for a
# result, or for room among the launches, of which about 1,024 can be queued.
LONGEST = 0.5


@dataclass(frozen=True)
class GpuTiming(Timing):
    """host: seconds in which the host queues the call, the median."""

    host: float


class GpuTimer:
    """Seconds by the device's own clock; on the CPU, where it serves to try things out, the host's."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffer: Tensor | None = None
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._buffer = torch.zeros(max(4 * cache, LEAST_FLUSH) // 4, device=self.device)

    def measure(self, call: Callable[[], object], *, seconds: float, least: int = 5) -> GpuTiming:
        """Times `call` for about `seconds`, at least `least` times, after two calls that are not counted."""
        call()
        self.synchronize()
        wait = MARGIN * min(host_seconds(call), LONGEST)
        self.synchronize()
        begin, seen, host = time.perf_counter(), list[float](), list[float]()
        while len(seen) < least or time.perf_counter() - begin < seconds:
            device, queueing = self._once(call, wait)
            seen.append(device)
            host.append(queueing)
        return GpuTiming(statistics.median(seen), min(seen), max(seen), len(seen), statistics.median(host))

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

    def _once(self, call: Callable[[], object], wait: float) -> tuple[float, float]:
        """Seconds by the device's clock, and the host's to queue the call."""
        if self._buffer is None:
            seconds = host_seconds(call)
            return seconds, seconds
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda._sleep(int(wait * CLOCK))  # type: ignore[no-untyped-call]
        self._buffer.amax()
        start.record()
        host = host_seconds(call)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3, host


def host_seconds(call: Callable[[], object]) -> float:
    """Seconds until the call returns."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
