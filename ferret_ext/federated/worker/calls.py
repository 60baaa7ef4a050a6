"""What a server says to a worker and what comes back, as maps of plain values (see `ferret_link.frames`).

    hello      kind                                    who are you, and how far?
    train      kind, run bytes, round, client, since, broadcasts list of bytes; settings str and base bytes
               where since is 0; invitation bytes where the algorithm has one
                                                       a round's work, see `Algorithm.client_update`
    ask        kind, run bytes, round, client, request bytes
                                                       what else a round takes, see `Members.reply`

    hello      kind, client, run bytes, seen           its run, and how many broadcasts it has taken in
    reply      kind, payload bytes, train_loss, failure str, local, project, rebuild
    behind     kind, seen                              broadcasts before the announced ones are missing
    error      kind, type str, text str                what went wrong; the worker lives on

run: names the run, zeros for none. invitation: of the round's `Assembly`. since: how many broadcasts the
receiver has seen before these. settings: the run's as its ledger has them. base: SHA-256 of the model that
the run begins with. local, project and rebuild: seconds. payload, broadcasts, invitation and request are
messages of docs/wire.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.wire import DIGEST_BYTES

MAX_TEXT = 1000  # characters of an error
LARGEST_LOSS = 1e30  # sums of losses stay far from overflow
LONGEST = 1e9  # seconds
OPTIONAL = ("invitation", "settings", "base")  # of a call to train
PHASES = ("local", "project", "rebuild")

Frame = dict[str, Any]


class CallError(ValueError):
    """A call or an answer that is none."""


@dataclass(frozen=True)
class Train:
    """A call for a round's work. settings, base: those of the run, or "" and b""."""

    run: bytes
    round: int
    client: int
    since: int
    broadcasts: list[bytes]
    settings: str = ""
    base: bytes = b""
    invitation: bytes = b""

    @classmethod
    def read(cls, frame: Mapping[str, Any]) -> Train:
        """The call in a frame. Raises CallError."""
        run, broadcasts = _run(frame), take(frame, "broadcasts", list)
        if not all(isinstance(broadcast, bytes) for broadcast in broadcasts):
            raise CallError("broadcasts: expected a list of bytes")
        round_, client, since = (whole(frame, name) for name in ("round", "client", "since"))
        invitation = take(frame, "invitation", bytes) if "invitation" in frame else b""
        if not frame.get("settings"):
            return cls(run, round_, client, since, broadcasts, invitation=invitation)
        told = take(frame, "settings", str), take(frame, "base", bytes)
        return cls(run, round_, client, since, broadcasts, *told, invitation)

    def frame(self) -> Frame:
        told = {name: value for name, value in vars(self).items() if value or name not in OPTIONAL}
        return {"kind": "train", **told}


@dataclass(frozen=True)
class Asked:
    """A call for what else a round takes of a client."""

    run: bytes
    round: int
    client: int
    request: bytes

    @classmethod
    def read(cls, frame: Mapping[str, Any]) -> Asked:
        """The call in a frame. Raises CallError."""
        return cls(_run(frame), whole(frame, "round"), whole(frame, "client"), take(frame, "request", bytes))

    def frame(self) -> Frame:
        return {"kind": "ask", **vars(self)}


def hello(client: int, run: bytes, seen: int) -> Frame:
    return {"kind": "hello", "client": client, "run": run, "seen": seen}


def behind(seen: int) -> Frame:
    return {"kind": "behind", "seen": seen}


def error(kind: str, text: str) -> Frame:
    """An error in one line of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return {"kind": "error", "type": kind, "text": line[:MAX_TEXT]}


def reply(done: Reply) -> Frame:
    """What a client's part of a round gave."""
    seconds = {phase: done.watch[phase] for phase in PHASES}
    told = {"payload": done.payload, "train_loss": done.train_loss, "failure": done.failure}
    return {"kind": "reply", **told, **seconds}


def read_reply(frame: Mapping[str, Any], client: int, bytes_down: int) -> Reply:
    """What came from a client, whose payload is still to be looked at. Raises CallError.

    A loss or seconds that are out of all bounds count as not said: they are for people, and not to be summed.
    """
    watch, loss = Stopwatch(), take(frame, "train_loss", float)
    for phase in PHASES:
        seconds = take(frame, phase, float)
        watch.add(phase, seconds if 0 <= seconds <= LONGEST else 0.0)
    failure = error("", take(frame, "failure", str))["text"]
    loss = loss if abs(loss) <= LARGEST_LOSS else math.nan
    return Reply(client, take(frame, "payload", bytes), bytes_down, loss, watch, failure)


def take(frame: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value called `name`. Raises CallError if there is none, or one of another type."""
    value = frame.get(name)
    if type(value) is not kind:
        got = "none" if value is None else type(value).__name__
        raise CallError(f"{name}: expected {kind.__name__}, got {got}")
    return value


def _run(frame: Mapping[str, Any]) -> bytes:
    run: bytes = take(frame, "run", bytes)
    if len(run) != DIGEST_BYTES:
        raise CallError(f"run: expected {DIGEST_BYTES} bytes, got {len(run)}")
    return run


def whole(frame: Mapping[str, Any], name: str) -> int:
    """The whole number in [0, 2^32) called `name`. Raises CallError."""
    value: int = take(frame, name, int)
    if not 0 <= value < 2**32:
        raise CallError(f"{name}: expected a whole number in [0, 2^32), got {value!s:.40}")
    return value
