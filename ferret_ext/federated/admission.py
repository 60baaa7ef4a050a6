"""Which of the bytes that clients sent a round takes, and why it leaves out the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median_low
from typing import Any, NamedTuple

from ferret_ext.federated import digests, wire
from ferret_ext.federated.algorithms.base import Algorithm, Replica, check
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import RobustConfig
from ferret_ext.federated.errors import DisagreementError, QuorumError
from ferret_ext.federated.metrics import Rejection
from ferret_ext.federated.privacy import Release
from ferret_ext.federated.seeds import UsedSeeds
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message, WireError

LONGEST_REASON = 300  # characters; a reason may quote what a client made up


class Sent(NamedTuple):
    """What one client sent. client: who that was, as whatever carried the bytes knows it."""

    client: int
    payload: bytes


class Taken(NamedTuple):
    """An update that the round may take, as it came, and how large it is."""

    message: Message
    payload: bytes
    norm: float


@dataclass
class Admission:
    """Takes updates one by one; what is wrong with one does not touch the others.

    equal_weights: clients count alike, and none may claim more. release: how a round's sum is made private,
    if it is; then no client's update decides over another's. used: the seeds of all updates that counted
    in former rounds. An update along directions that its client chose after it had seen others', or a
    replayed one, would carry a seed again.
    """

    algorithm: Algorithm[Any]
    config: RobustConfig
    equal_weights: bool = False
    release: Callable[[int], Release | None] = lambda round_: None
    used: UsedSeeds = field(default_factory=UsedSeeds)

    def __post_init__(self) -> None:
        if self.config.rule not in self.algorithm.rules:
            raise ConfigError(
                f"robust.rule: expected one of {', '.join(self.algorithm.rules)} with {self.algorithm.name}, "
                f"got {self.config.rule}"
            )

    def screen(
        self,
        replica: Replica,
        chosen: Sequence[int],
        sent: Sequence[Sent],
        also: Callable[[Message], None] = lambda update: None,
    ) -> tuple[Updates, list[Rejection]]:
        """The updates of the chosen clients that the round takes, in the order of `chosen`, and what it does
        not take. Nothing is remembered. also: raises WireError for what else does not fit.

        Raises DisagreementError where a client says that its weights are others, unless such clients are
        rejected, and QuorumError where fewer updates are left than `robust.quorum`.
        """
        release = self.release(replica.round + 1)
        taken: dict[int, Taken] = {}
        rejections = []
        for client, payload in sent:
            try:
                message = wire.decode(payload, copy=False)
                self._check(replica, message, client, chosen, taken)
                also(message)
            except WireError as error:
                rejections.append(_rejection(client, error))
                continue
            taken[client] = Taken(message, payload, self.algorithm.norm(replica, message))
        ratio = self.config.max_norm_ratio if release is None else math.inf
        for unfit in (partial(self._too_long, ratio), self._too_heavy, self._repeated):
            found = list(unfit(taken))
            rejections += found
            for rejection in found:
                del taken[rejection.client]
        if len(taken) < self.config.quorum:
            raise QuorumError(_too_few(replica.round + 1, len(taken), self.config.quorum, rejections))
        ordered = [taken[client] for client in chosen if client in taken]
        messages, received, norms = zip(*ordered, strict=True)
        factors = self._factors(norms) if release is None else release.factors(norms)
        rule, trim = self.config.rule, self.config.trim
        return Updates(messages, received, factors, rule, trim, release=release), rejections

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
            self._hear(replica, message)
        self.algorithm.check_update(replica, message)
        if self.equal_weights:
            check(self.algorithm.name, message.sender, "weight", 1.0, message.weight)

    def _hear(self, replica: Replica, dissent: Message) -> None:
        """Raises DisagreementError with the first parameter that differs, or WireError: for a dissent without
        one, and where dissenting clients are rejected."""
        text = _disagreement(replica, self.algorithm.name, dissent)
        if self.config.on_dissent == "reject":
            raise WireError(text)
        raise DisagreementError(text)

    def _too_long(self, ratio: float, taken: Mapping[int, Taken]) -> Iterator[Rejection]:
        norms = {client: update.norm for client, update in taken.items()}
        return _standing_out("norm", norms, ratio)

    def _too_heavy(self, taken: Mapping[int, Taken]) -> Iterator[Rejection]:
        weights = {client: update.message.weight for client, update in taken.items()}
        return _standing_out("weight", weights, self.config.max_weight_ratio)

    def _repeated(self, taken: Mapping[int, Taken]) -> Iterator[Rejection]:
        seen: set[int] = set()
        for client, update in taken.items():
            seeds = self.algorithm.seeds(update.message)
            if again := [seed for seed in seeds if seed in self.used or seed in seen]:
                sender = update.message.sender
                yield Rejection(client, f"{sender} must have a new seed, got {again[0]} again")
            seen.update(seeds)

    def _factors(self, norms: Sequence[float]) -> list[float]:
        if self.config.rule != "norm-clip":
            return [1.0] * len(norms)
        most = self.config.clip_ratio * median_low(norms)
        return [most / norm if norm > most else 1.0 for norm in norms]


def _standing_out(what: str, sizes: Mapping[int, float], ratio: float) -> Iterator[Rejection]:
    """What is out of all proportion to the others'. The lower median: of two, the smaller is the measure.

    Where most are 0 there is no measure, and nothing stands out.
    """
    most = ratio * median_low(sizes.values()) if sizes else 0.0
    for client, size in sizes.items():
        if not math.isfinite(size):
            yield Rejection(client, f"{what} must be finite, got {size}")
        elif size > most > 0:
            yield Rejection(client, f"{what} must be at most {most:.6g}, got {size:.6g}")


def _disagreement(replica: Replica, name: str, dissent: Message) -> str:
    """What a dissent says, in words. Raises WireError for one that says nothing, or not of this round."""
    for field_, ours, theirs in (
        ("algorithm", name, dissent.algorithm),
        ("run", replica.run.hex(), dissent.run.hex()),
        ("round", replica.round + 1, dissent.round),
        ("digest", replica.digest.hex(), dissent.digest.hex()),
    ):
        check(name, dissent.sender, field_, ours, theirs)
    size, own = wire.DIGEST_BYTES, digests.of_each(replica.held)
    sent = dissent.array("digests", "u1", (len(own) * size,)).tobytes()
    each = [sent[start : start + size] for start in range(0, len(sent), size)]
    if each == own:
        raise WireError(f"{dissent.sender} has the same digests as the server")
    difference = digests.first_difference(replica.names, own, each)
    return (
        f"after round {replica.round} client {dissent.client} has other weights than the server: {difference}"
    )


def _rejection(client: int, error: WireError) -> Rejection:
    """In one line of bounded length: a name in a message may hold what would forge lines of a log."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))
    return Rejection(client, text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..")


def _too_few(round_: int, count: int, quorum: int, rejections: Sequence[Rejection]) -> str:
    reasons = "".join(f"; client {rejection.client}: {rejection.reason}" for rejection in rejections)
    return f"round {round_}: expected at least {quorum} updates, got {count}{reasons}"
