"""Which of the bytes that clients sent a round takes, and why it leaves out the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from ferret_ext.federated import digests, wire
from ferret_ext.federated.algorithms.base import Algorithm, Replica, check, trainable
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import RobustConfig
from ferret_ext.federated.errors import DisagreementError, QuorumError
from ferret_ext.federated.metrics import Rejection
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message, WireError


class Sent(NamedTuple):
    """What one client sent. client: who that was, as whatever carried the bytes knows it."""

    client: int
    payload: bytes


@dataclass
class Admission:
    """Takes updates one by one; what is wrong with one does not touch the others.

    used: the seeds of all updates taken so far. An update along directions that its client chose after it had
    seen others', or a replayed one, would carry a seed again.
    """

    algorithm: Algorithm[Any]
    config: RobustConfig
    used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.config.rule not in self.algorithm.rules:
            raise ConfigError(
                f"robust.rule: expected one of {', '.join(self.algorithm.rules)} with {self.algorithm.name}, "
                f"got {self.config.rule}"
            )

    def screen(
        self, replica: Replica, chosen: Collection[int], sent: Sequence[Sent]
    ) -> tuple[Updates, list[Rejection]]:
        """The updates of the chosen clients that the round takes, and what it does not take.

        Raises DisagreementError where a client says that its weights are others, and QuorumError where fewer
        updates are left than `robust.quorum`.
        """
        taken: dict[int, tuple[Message, bytes]] = {}
        rejections = []
        for client, payload in sent:
            try:
                message = wire.decode(payload, copy=False)
                self._check(replica, message, client, chosen, taken)
            except WireError as error:
                rejections.append(Rejection(client, str(error)))
                continue
            taken[client] = message, payload
        sizes = {client: self.algorithm.norm(replica, message) for client, (message, _) in taken.items()}
        for rejection in self._outsized(taken, sizes):
            rejections.append(rejection)
            del taken[rejection.client]
        if len(taken) < self.config.quorum:
            raise QuorumError(_too_few(replica.round + 1, len(taken), self.config.quorum, rejections))
        messages, received = zip(*taken.values(), strict=True)
        factors = self._factors([sizes[client] for client in taken])
        return Updates(messages, received, factors, self.config.rule, self.config.trim), rejections

    def remember(self, message: Message) -> None:
        """Takes the seeds in an update or a broadcast as used."""
        self.used.update(self.algorithm.seeds(message))

    def _check(
        self,
        replica: Replica,
        message: Message,
        client: int,
        chosen: Collection[int],
        taken: Collection[int],
    ) -> None:
        """Raises WireError unless the message is this client's update and the first one of the round."""
        if message.client != client:
            raise WireError(f"client {client} sent a message in the name of client {message.client}")
        if client not in chosen:
            raise WireError(f"client {client} has no part in round {replica.round + 1}")
        if client in taken:
            raise WireError(f"client {client} has sent an update for round {replica.round + 1} already")
        if message.kind == "dissent":
            _hear(replica, message)
        self.algorithm.check_update(replica, message)
        if again := self.used.intersection(self.algorithm.seeds(message)):
            raise WireError(f"{message.sender} must have a new seed, got {again.pop()} again")
        self.remember(message)

    def _outsized(
        self, taken: dict[int, tuple[Message, bytes]], sizes: dict[int, float]
    ) -> Iterator[Rejection]:
        """Updates whose norm or weight stands out of all proportion to the others'."""
        weights = {client: message.weight for client, (message, _) in taken.items()}
        for what, of_each in (("norm", sizes), ("weight", weights)):
            most = self.config.max_ratio * median(of_each.values()) if of_each else 0.0
            for client, size in list(of_each.items()):
                if size > most > 0:
                    yield Rejection(client, f"{what} must be at most {most:.6g}, got {size:.6g}")
                    weights.pop(client)

    def _factors(self, sizes: Sequence[float]) -> list[float]:
        if self.config.rule != "norm-clip":
            return [1.0] * len(sizes)
        most = self.config.clip_ratio * median(sizes)
        return [min(1.0, most / size) if size else 1.0 for size in sizes]


def _hear(replica: Replica, dissent: Message) -> None:
    """Raises DisagreementError with the first parameter that differs, WireError for a dissent without one."""
    for field_, ours, theirs in (
        ("run", replica.run.hex(), dissent.run.hex()),
        ("round", replica.round + 1, dissent.round),
        ("digest", replica.digest.hex(), dissent.digest.hex()),
    ):
        check(dissent.algorithm, dissent.sender, field_, ours, theirs)
    size, own = wire.DIGEST_BYTES, digests.of_each(replica.params)
    sent = dissent.array("digests", "u1", (len(own) * size,)).tobytes()
    each = [sent[start : start + size] for start in range(0, len(sent), size)]
    if each == own:
        raise WireError(f"{dissent.sender} has the same digests as the server")
    difference = digests.first_difference(list(trainable(replica.model)), own, each)
    raise DisagreementError(
        f"after round {replica.round} client {dissent.client} has other weights than the server: {difference}"
    )


def _too_few(round_: int, count: int, quorum: int, rejections: Sequence[Rejection]) -> str:
    reasons = "".join(f"; client {rejection.client}: {rejection.reason}" for rejection in rejections)
    return f"round {round_}: expected at least {quorum} updates, got {count}{reasons}"
