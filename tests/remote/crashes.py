"""Federations whose processes are killed at random moments, compared with the run in one process.

    python tests/remote/crashes.py [--runs N] [--seed S]

At random moments a process is killed (SIGKILL): a worker, a ClientApp, a SuperNode, the ServerApp, the
SuperLink, or ferret serve and with it the last two. A server that has ended is resumed. In the end the
updates that counted and the weights after every round must be those of the run in one process. Prints a
summary as JSON.
"""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

from real_federation import KINDS, Site, make_parser, processes, repeat, run_to_end

from ferret_ext.federated.engines.flower.processes import free_port

QUIET = 10.0  # seconds between two deaths, on average


class Reaper:
    """Kills processes of a federation, at most so many."""

    def __init__(self, mark: str, deaths: int, draw: random.Random) -> None:
        self._mark, self._deaths, self._draw = mark, deaths, draw
        self._next = time.monotonic() + draw.uniform(4, 20)
        self._kind: str | None = None  # whose turn it is
        self.killed: Counter[str] = Counter()

    def __call__(self) -> None:
        """Kills one if it is time; where there is none of the kind whose turn it is, once there is."""
        if self.killed.total() >= self._deaths or time.monotonic() < self._next:
            return
        self._kind = self._kind or self._draw.choice(list(KINDS))
        living = processes(self._mark)[self._kind]
        if not living:
            self._next = time.monotonic() + self._draw.uniform(0, 1)
            return
        with suppress(ProcessLookupError):
            os.kill(self._draw.choice(living), signal.SIGKILL)
            self.killed[self._kind] += 1
        self._kind, self._next = None, time.monotonic() + self._draw.expovariate(1 / QUIET)


def federate(folder: Path, deaths: int, draw: random.Random) -> Counter[str]:
    """One federation to its end, with so many deaths unless it ends before; what was killed."""
    mark, address = uuid.uuid4().hex, f"127.0.0.1:{free_port()}"
    reaper = Reaper(mark, deaths, draw)
    starts = run_to_end(folder, mark, [Site("0,1", address)], address, reaper)
    return reaper.killed + Counter({"ends of the server": starts})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--deaths", type=int, default=4, help="a run, at most")
    options = parser.parse_args()
    repeat(options, lambda folder, draw: federate(folder, options.deaths, draw))


if __name__ == "__main__":
    main()
