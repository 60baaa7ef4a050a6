"""What the processor can do at best, measured in the run whose figures are compared with it.

- philox: 32-bit words a second of the vectorised generator alone, on the path in use.
- read: bytes a second of a plain read of an array.
- update: bytes a second read by a plain update in place, which writes as many.

The last two depend on where the array lies, so they are taken at the size of the array that they are compared
with, or on it (`use`), as the best of several library functions. A yardstick is a bound, so its fastest call
counts, where a rate is of the median one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from timer import Timing, measure
from torch import Tensor

import ferret_ext._native as native

PHILOX_COLUMNS, PHILOX_CALLS = 64, 1 << 16


def philox(threads: int, seconds: float) -> tuple[float, str, Timing]:
    """Every thread computes words of its own and keeps their exclusive or."""
    call = partial(native.philox_checksum, columns=PHILOX_COLUMNS, calls=PHILOX_CALLS)
    with ThreadPoolExecutor(threads) as pool:
        timing = measure(lambda: list(pool.map(call, range(threads))), seconds=seconds)
    words = 4 * PHILOX_COLUMNS * PHILOX_CALLS * threads
    return words / timing.fastest, f"{PHILOX_COLUMNS} columns", timing


def read(x: Tensor, seconds: float) -> tuple[float, str, Timing]:
    """Reductions of x; torch's on its threads, numpy's on one."""
    y = x.numpy()
    return best(
        x,
        {
            "torch sum": x.sum,
            "torch dot": partial(torch.dot, x, x),
            "torch amax": x.amax,
            "numpy dot": partial(np.dot, y, y),
            "numpy max": y.max,
        },
        seconds,
    )


def update(x: Tensor, seconds: float) -> tuple[float, str, Timing]:
    """x + 1 in place."""
    y = x.numpy()
    return best(x, {"torch add_": partial(x.add_, 1), "numpy add": partial(np.add, y, 1, out=y)}, seconds)


def best(x: Tensor, candidates: dict[str, Callable[[], object]], seconds: float) -> tuple[float, str, Timing]:
    """Bytes of x a second by the fastest candidate, its name and timing."""
    timings = {name: measure(call, seconds=seconds) for name, call in candidates.items()}
    name = min(timings, key=lambda name: timings[name].fastest)
    return x.nbytes / timings[name].fastest, name, timings[name]


class Yardsticks:
    """Each yardstick, measured once when it is first asked for; `rows` holds all of them."""

    def __init__(self, seconds: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._seconds = seconds
        self._known: dict[tuple[str, int, int], float] = {}
        self._arrays: dict[int, Tensor] = {}

    def use(self, x: Tensor) -> None:
        """Measures on x, of float32, what is asked for as many bytes; update changes it. Beyond the caches
        arrays of one size are read at different rates, each always at its own."""
        self._arrays[x.nbytes] = x

    def __call__(self, what: str, threads: int, nbytes: int = 0) -> float:
        """Words or bytes a second of "philox", "read" or "update" on `threads` threads."""
        key = (what, threads, nbytes)
        if key not in self._known:
            self._known[key] = self._measure(*key)
        return self._known[key]

    def _measure(self, what: str, threads: int, nbytes: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        if what == "philox":
            rate, by, timing = philox(threads, self._seconds)
        else:
            x = self._arrays.get(nbytes)
            x = torch.ones(nbytes // 4) if x is None else x
            rate, by, timing = {"read": read, "update": update}[what](x, self._seconds)
        torch.set_num_threads(before)
        row = {"section": "yardstick", "what": what, "threads": threads, "bytes": nbytes}
        self.rows.append(row | {"per_second": rate, "by": by, "timing": timing})
        return rate

    def table(self) -> str:
        """All of them as text."""
        lines = [f"{'':10} {'MB':>8} thr {'G/s':>8}  by"]
        for row in sorted(self.rows, key=lambda row: (row["what"], row["bytes"], row["threads"])):
            size = f"{row['bytes'] / 1e6:,.0f}" if row["bytes"] else ""
            rate = row["per_second"] / 1e9
            lines.append(f"{row['what']:10} {size:>8} {row['threads']:>3} {rate:8.2f}  {row['by']}")
        return "\n".join(lines)
