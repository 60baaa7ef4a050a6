"""One timer and one way of writing results for every benchmark."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, fastest and slowest of `calls` timed calls after a warm-up."""

    median: float
    fastest: float
    slowest: float
    calls: int


def measure(call: Callable[[], object], *, seconds: float = 1.0, least: int = 5) -> Timing:
    """Times `call` for about `seconds`, at least `least` times, after one call that is not counted."""
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return Timing(statistics.median(times), min(times), max(times), len(times))


def machine() -> dict[str, Any]:
    """What the figures of a run hold for."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """rows, whose timings are dataclasses, as JSON beside the machine they were taken on."""
    plain = [
        {key: asdict(value) if isinstance(value, Timing) else value for key, value in row.items()}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": plain}, indent=1) + "\n")
