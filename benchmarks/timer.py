"""One timer and one way of writing results for every benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
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
    return measure_in_turns([call], seconds=seconds, least=least)[0]


def measure_in_turns(
    calls: Sequence[Callable[[], object]], *, seconds: float = 1.0, least: int = 5
) -> list[Timing]:
    """`measure` of each of several calls that are to be compared. They take `least` turns, so that a machine
    that is slower for a while is so for all of them."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(1, least + 1):
        for call, seen in zip(calls, times, strict=True):
            while len(seen) < turn or sum(seen) < seconds * turn / least:
                begin = time.perf_counter()
                call()
                seen.append(time.perf_counter() - begin)
    return [Timing(statistics.median(seen), min(seen), max(seen), len(seen)) for seen in times]


def machine() -> dict[str, Any]:
    """What the figures of a run hold for."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "last_level_cache": last_level_cache(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The source's commit; COMMIT in the environment names it where the source is no git checkout."""
    if named := os.environ.get("COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:  # no git
        return "unknown"
    return run.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name, with family and model where the name has no number that tells it apart."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.machine()
    if "model" in facts and not re.search(r"\d", name):
        name += f", family {facts['cpu family']} model {facts['model']} stepping {facts['stepping']}"
    return name


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core uses; 0 where the system does not tell."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=0)


def memory_available() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo: expected a line MemAvailable, got none")


def write(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """rows, whose timings are dataclasses, as JSON beside the machine and the `facts` they were taken on.

    A file that is there stays whole until the new one takes its place, whenever the program is killed.
    """
    plain = [
        {key: asdict(value) if isinstance(value, Timing) else value for key, value in row.items()}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps({"machine": machine() | facts, "rows": plain}, indent=1) + "\n")
    new.replace(path)
