"""Requests and answers of secure aggregation, as messages of docs/wire.md.

`stage` says which of a round's exchanges a message belongs to (keys, update, pairs, shares), `session` which
attempt at the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ferret_ext.federated import wire
from ferret_ext.federated.secure import masks
from ferret_ext.federated.wire import Kind, Message, Value, WireError

NAME = "ferret-secure"


def write(kind: Kind, stage: str, about: Message, session: bytes, client: int, **values: Value) -> bytes:
    """A request or an answer of the run and round that `about` is of."""
    told: dict[str, Value] = {"stage": stage, "session": session, **values}
    return wire.encode(Message(NAME, kind, about.digest, about.round, client, values=told, run=about.run))


def read(data: bytes, kind: Kind) -> Message:
    """The message. Raises WireError for bytes that are no request, or no answer, of secure aggregation."""
    message = wire.decode(data)
    for what, expected, got in (("algorithm", NAME, message.algorithm), ("kind", kind, message.kind)):
        if got != expected:
            raise WireError(f"{NAME}: {message.sender} must have {what} {expected}, got {got}")
    session_of(message)
    return message


def session_of(message: Message) -> bytes:
    """The session that a message names. Raises WireError."""
    session = message.value("session", bytes)
    if len(session) != masks.SESSION_BYTES:
        raise WireError(
            f"{NAME}: {message.sender} must have session as {masks.SESSION_BYTES} bytes, got {len(session)}"
        )
    return session


def clients_of(message: Message, name: str) -> list[int]:
    """The numbers of clients called `name`, ascending. Raises WireError."""
    count = message.value(name, np.ndarray).size
    numbers: list[int] = message.array(name, "<u4", (count,)).tolist()
    if any(one >= next_ for one, next_ in pairwise(numbers)):
        raise WireError(f"{NAME}: {message.sender} must have {name} in ascending order")
    return numbers


def rows_of(message: Message, name: str, count: int, length: int) -> list[bytes]:
    """`count` times `length` bytes. Raises WireError."""
    return [row.tobytes() for row in message.array(name, "u1", (count, length))]


def rows(items: Sequence[bytes], length: int) -> wire.Array:
    """Byte strings of one length as an array uint8 [items, length]."""
    return np.frombuffer(b"".join(items), np.uint8).reshape(len(items), length)


def overhead(clients: int) -> tuple[int, int]:
    """Bytes that one of so many clients sends and receives beside update and broadcast in a round that nobody
    drops out of, but for those of small numbers."""
    everybody, session = numbers([2**16 - 1] * clients), bytes(masks.SESSION_BYTES)
    about = Message(NAME, "request", wire.NO_DIGEST, 1)

    def size(kind: Kind, stage: str, **values: Value) -> int:
        return len(write(kind, stage, about, session, 0, **values))

    def blank(length: int, count: int = clients) -> wire.Array:
        return np.zeros((count, length), np.uint8)

    answers = size("answer", "keys", key=blank(masks.KEY_BYTES, 1)[0])
    answers += size("answer", "shares", shares=blank(masks.SHARE_BYTES))
    requests = size("request", "keys")
    requests += size("request", "update", threshold=1, clients=everybody, keys=blank(masks.KEY_BYTES))
    requests += size("request", "shares", survivors=everybody, sealed=blank(masks.SEALED_BYTES))
    return answers, requests


def numbers(clients: Sequence[int]) -> wire.Array:
    return np.array(clients, np.uint32)
