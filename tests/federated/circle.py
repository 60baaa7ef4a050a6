"""A round of secure aggregation without models: participants, what they send, and whoever falls silent."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.algorithms.updates import Summed, Updates
from ferret_ext.federated.dialogue import Dialogue
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.secure import messages
from ferret_ext.federated.secure.assembly import MaskedSum, gather
from ferret_ext.federated.secure.participant import Participant
from ferret_ext.federated.wire import Message

RUN = b"the run."
Integers = npt.NDArray[np.int64]


def seeded(seed: int) -> Callable[[int], bytes]:
    """In place of the system's random bytes."""
    return np.random.default_rng(seed).bytes


def about(round_: int = 1) -> Message:
    return Message(messages.NAME, "request", wire.NO_DIGEST, round_, run=RUN)


@dataclass
class Circle:
    """Clients and a server. silent: clients that do not answer, by stage; `update` is one of them. seen: all
    that the server gets, by stage and client. change: what becomes of a request or answer on its way."""

    clients: Collection[int]
    silent: Mapping[str, Collection[int]] = field(default_factory=dict)
    seed: int | None = None
    seen: dict[tuple[str, int], bytes] = field(default_factory=dict)
    change: Callable[[str, int, bytes], bytes] = lambda stage, client, data: data

    def __post_init__(self) -> None:
        randoms = [] if self.seed is None else [seeded(1000 * self.seed + client) for client in self.clients]
        self.participants = {
            client: Participant(client, *([randoms[place]] if randoms else []))
            for place, client in enumerate(self.clients)
        }
        self.asked: list[str] = []
        self.left_out: dict[int, str] = {}

    def ask(self, round_: int, requests: Mapping[int, bytes], enough: int, least: int) -> list[Reply]:
        stage = messages.read(next(iter(requests.values())), "request").value("stage", str)
        self.asked.append(stage)
        replies = []
        for client, request in requests.items():
            if client in self.silent.get(stage, ()):
                replies.append(Reply(client, b"", 0, math.nan, Stopwatch(), "no reply"))
                continue
            reply = self.participants[client].reply(self.change("request", client, request))
            answer = self.change(stage, client, reply.payload)
            self.seen[stage, client] = answer
            replies.append(Reply(client, answer, len(request), math.nan, Stopwatch(), reply.failure))
        return replies

    def talk(self, round_: int = 1) -> Dialogue:
        return Dialogue(round_, self.ask, self.left_out.__setitem__)

    def gather(self, round_: int = 1, quorum: int = 1, share: float = 0.5) -> MaskedSum:
        random = () if self.seed is None else (seeded(self.seed),)
        return gather(about(round_), list(self.clients), quorum, share, self.talk(round_), *random)

    def update(self, assembly: MaskedSum, client: int, integers: Integers) -> Message:
        """The client's update, as it comes out of its bytes."""
        participant = self.participants[client]
        participant.join(assembly.invitation)
        round_ = assembly.about.round
        values = participant.hide(integers)
        sent = wire.encode(Message(messages.NAME, "update", bytes(8), round_, client, values=values, run=RUN))
        self.seen["update", client] = self.change("update", client, sent)
        message = wire.decode(self.seen["update", client])
        assembly.check(message)
        return message

    def sum(self, numbers: Mapping[int, Integers], round_: int = 1, **given: Any) -> tuple[list[int], Summed]:
        """A round: whose sum it is, and the sum."""
        assembly = self.gather(round_, **given)
        sent = [
            self.update(assembly, client, numbers[client])
            for client in assembly.clients
            if client not in self.silent.get("update", ())
        ]
        return settle(assembly, sent, self.talk(round_))


def settle(assembly: MaskedSum, sent: list[Message], talk: Dialogue) -> tuple[list[int], Summed]:
    settled = assembly.settle(Updates(sent, [b""] * len(sent), [1.0] * len(sent)), talk)
    assert settled.summed is not None
    return [message.client for message in settled.messages], settled.summed
