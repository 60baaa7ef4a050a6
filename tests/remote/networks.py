"""Federations whose network is cut, slow and lossy, compared with the run in one process.

    python tests/remote/networks.py [--runs N] [--seed S]

The server and its two clients live in network namespaces of their own, and the only ways between them are two
wires: pairs of TUN devices, between which this process carries the packets, or does not. At random moments a
wire is cut (packets vanish), unplugged at the client (errors at once), slow, or lossy, and works again after
seconds. In the end the updates that counted and the weights after every round must be those of the run in
one process. Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN), /dev/net/tun and iproute2. Prints a summary as JSON.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from real_federation import Site, make_parser, repeat, run_to_end

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
PORT = 9092
QUIET = 8.0  # seconds between two faults of a wire, on average
SHORTEST, LONGEST = 2.0, 30.0  # seconds of a fault
FAULTS = ("cut", "unplugged", "slow", "lossy")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace with nothing in it but loopback."""
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "del", name)


class Wire:
    """A wire between two namespaces, of which `number` makes the addresses. A context manager.

    What goes in at one end comes out at the other after `delay` seconds and up to as many more, so that
    packets overtake each other; a share of `loss` never does.
    """

    def __init__(self, number: int, server: str, client: str) -> None:
        self.server, self.client = f"10.77.{number}.1", f"10.77.{number}.2"
        self.delay = self.loss = 0.0
        self._name, self._namespace = f"wire{number}", client
        self._ends = [
            self._plug(server, self.server, self.client),
            self._plug(client, self.client, self.server),
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def _plug(self, namespace: str, own: str, other: str) -> int:
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", self._name.encode(), IFF_TUN | IFF_NO_PI))
        ip("link", "set", self._name, "netns", namespace)
        ip("-n", namespace, "address", "add", own, "peer", other, "dev", self._name)
        ip("-n", namespace, "link", "set", self._name, "up")
        return end

    def plug(self, into: bool) -> None:
        """Into the client's machine, or out of it."""
        ip("-n", self._namespace, "link", "set", self._name, "up" if into else "down")

    def _carry(self) -> None:
        late: list[tuple[float, int, int, bytes]] = []  # when, a number that breaks ties, end, packet
        numbers, draw = count(), random.Random()
        while not self._stop.is_set():
            patience = max(0.0, late[0][0] - time.monotonic()) if late else 0.2
            for end in select.select(self._ends, [], [], min(patience, 0.2))[0]:
                packet = _quietly(os.read, end, 65536)
                if packet and draw.random() >= self.loss:
                    due = time.monotonic() + self.delay * (1 + draw.random())
                    heapq.heappush(late, (due, next(numbers), self._ends[end == self._ends[0]], packet))
            while late and late[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(late)
                _quietly(os.write, end, packet)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)


def _quietly(call, *arguments):  # type: ignore[no-untyped-def]
    """None where the device is down, or its queue full: then the packet is lost, as on any network."""
    try:
        return call(*arguments)
    except OSError:
        return None


class Weather:
    """What happens to a wire: one fault after the other, with quiet between them."""

    def __init__(self, wire: Wire, draw: random.Random) -> None:
        self._wire, self._draw = wire, draw
        self._now: str | None = None
        self._next = time.monotonic() + draw.uniform(4, 20)
        self.faults: Counter[str] = Counter()
        self.seconds = 0.0

    def __call__(self) -> None:
        """Begins or ends a fault if it is time."""
        if time.monotonic() < self._next:
            return
        if self._now:
            self._set(None)
            self._next = time.monotonic() + self._draw.expovariate(1 / QUIET)
            return
        self._set(self._draw.choice(FAULTS))
        lasts = self._draw.uniform(SHORTEST, LONGEST)
        self._next = time.monotonic() + lasts
        self.seconds += lasts

    def _set(self, fault: str | None) -> None:
        if "unplugged" in (fault, self._now):
            self._wire.plug(into=fault != "unplugged")
        self._wire.loss = {"cut": 1.0, "lossy": self._draw.uniform(0.05, 0.3)}.get(fault or "", 0.0)
        self._wire.delay = self._draw.uniform(0.1, 1.0) if fault == "slow" else 0.0
        self._now = fault
        if fault:
            self.faults[fault] += 1


def federate(folder: Path, draw: random.Random) -> Counter[str]:
    """One federation to its end; what happened to its wires."""
    mark = uuid.uuid4().hex
    with ExitStack() as stack:
        names = [stack.enter_context(namespace(f"ferret-{mark[:8]}-{n}")) for n in range(3)]
        wires = [stack.enter_context(Wire(n, names[2], names[n])) for n in range(2)]
        sites = [
            Site(str(n), f"{wire.server}:{PORT}", ("ip", "netns", "exec", names[n]))
            for n, wire in enumerate(wires)
        ]
        weathers = [Weather(wire, draw) for wire in wires]

        def disturb() -> None:
            for weather in weathers:
                weather()

        starts = run_to_end(
            folder, mark, sites, f"0.0.0.0:{PORT}", disturb, ("ip", "netns", "exec", names[2])
        )
    seconds = Counter({"seconds of faults": round(sum(weather.seconds for weather in weathers))})
    happened = sum((weather.faults for weather in weathers), Counter[str]())
    return happened + seconds + Counter({"ends of the server": starts})


if __name__ == "__main__":
    repeat(make_parser(__doc__).parse_args(), federate)
