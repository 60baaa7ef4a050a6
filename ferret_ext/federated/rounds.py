"""The round loop (arXiv 2409.06277, algorithm 1), on whatever engine carries the bytes."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, Protocol

from ferret_ext.federated.accounting import Spent
from ferret_ext.federated.admission import Sent
from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.client import DivergedError
from ferret_ext.federated.dialogue import Ask, Dialogue, nobody_to_ask
from ferret_ext.federated.evaluation import Evaluation, Sample
from ferret_ext.federated.metrics import Outcome, Rejection, RoundMetrics, Stopwatch
from ferret_ext.federated.server import Server
from ferret_ext.federated.wire import NotFiniteError


class Watcher(Protocol):
    """Whoever wants to see a run go by."""

    def round_begins(self, round_: int, clients: list[int]) -> None: ...

    def client_done(self, round_: int, client: int) -> None: ...

    def client_left_out(self, round_: int, client: int, reason: str) -> None: ...

    def update_rejected(self, round_: int, rejection: Rejection) -> None: ...

    def round_ends(self, metrics: RoundMetrics, samples: Sequence[Sample]) -> None: ...


class Deaf:
    """A watcher that takes no notice; what it is to notice, a subclass says."""

    def round_begins(self, round_: int, clients: list[int]) -> None: ...

    def client_done(self, round_: int, client: int) -> None: ...

    def client_left_out(self, round_: int, client: int, reason: str) -> None: ...

    def update_rejected(self, round_: int, rejection: Rejection) -> None: ...

    def round_ends(self, metrics: RoundMetrics, samples: Sequence[Sample]) -> None: ...


class Journal(Protocol):
    """What a run writes down, so that it can be resumed.

    measured: the metrics of the rounds that need no measuring any more.
    """

    measured: list[RoundMetrics]

    def key(self) -> int:
        """A secret of 128 bits, the same when the run is resumed; to be asked for before `replay`."""

    def replay(self, server: Server[Any]) -> Iterator[Outcome]:
        """Takes the server through the rounds that count; gives each that is not measured, as the newest."""

    def commit(self, server: Server[Any], outcome: Outcome) -> None:
        """Writes the round down; it counts once this returns."""


class NoJournal:
    """Writes nothing down."""

    def __init__(self) -> None:
        self.measured: list[RoundMetrics] = []

    def key(self) -> int:
        return secrets.randbits(128)

    def replay(self, server: Server[Any]) -> Iterator[Outcome]:
        yield Outcome(0)

    def commit(self, server: Server[Any], outcome: Outcome) -> None: ...


Exchange = Callable[[int, list[int], Server[Any]], list[Reply]]  # round, its clients, server -> their replies
Evaluate = Callable[[int, Any, Stopwatch], Evaluation]  # round, model -> loss, scores and samples


def run_rounds(
    rounds: int,
    server: Server[Any],
    exchange: Exchange,
    evaluate: Evaluate,
    watcher: Watcher,
    model_bytes: int,
    journal: Journal | None = None,
    ask: Ask = nobody_to_ask,
    spent: Callable[[int], Spent] | None = None,
) -> list[RoundMetrics]:
    """Rounds 1 .. `rounds`; returns the metrics of each, after those of the untrained model as round 0.

    spent: what privacy has cost after a round, where it is promised.

    A client whose training fails is left out of its round, whose mean is that of the others; so is an update
    that is rejected. ask: carries what else the algorithm asks of clients. A round counts once the journal
    has it. Raises RunError where no update can be taken, or too few, and DivergedError where the numbers of
    the model or its evaluation are no longer finite.

    for r = 1 .. R:
        the server draws the round's clients, and asks them for what the algorithm needs beforehand
        each client: rebuilds w_{r-1} from what the server relays, trains T steps, sends its update
        the server asks for what it needs afterwards
        the server: w_r = w_{r-1} - server_learning_rate * mean of the updates
    """
    journal = journal or NoJournal()
    history = list(journal.measured)

    def measure(outcome: Outcome, watch: Stopwatch) -> None:
        try:
            evaluation = evaluate(outcome.round, server.replica.model, watch)
        except DivergedError as error:
            cause = "lower the learning rates" if outcome.round else "the model is broken before any training"
            raise DivergedError(f"round {outcome.round}: {error}; {cause}") from None
        history.append(outcome.with_evaluation(evaluation.loss, evaluation.scores, watch, model_bytes))
        watcher.round_ends(history[-1], evaluation.samples)

    for outcome in journal.replay(server):
        measure(outcome, Stopwatch())
    for round_ in range(server.replica.round + 1, rounds + 1):
        watch = Stopwatch()
        drawn = server.choose(round_)
        watcher.round_begins(round_, drawn)
        talk = Dialogue(round_, ask, partial(watcher.client_left_out, round_))
        clients = list(server.assemble(drawn, talk))
        came = exchange(round_, clients, server)
        replies = [reply for reply in came if not reply.late]
        sent = [Sent(reply.client, reply.payload) for reply in replies if not reply.failure]
        if replies and not sent:
            raise DivergedError(f"every client in round {round_}: {replies[0].failure}")
        try:
            with watch("server"):
                updates, rejections = server.apply(clients, sent, talk)
        except NotFiniteError as error:
            raise DivergedError(f"round {round_}: {error}; lower server_learning_rate") from None
        for rejection in rejections:
            watcher.update_rejected(round_, rejection)
        outcome = _outcome(round_, drawn, replies, updates, rejections, watch, talk)
        epsilon, delta = spent(round_) if spent else (None, None)
        outcome = replace(outcome, late=len(came) - len(replies), epsilon=epsilon, delta=delta)
        journal.commit(server, outcome)
        measure(outcome, watch)
    return history


def _outcome(
    round_: int,
    clients: list[int],
    replies: list[Reply],
    updates: Updates,
    rejections: list[Rejection],
    watch: Stopwatch,
    talk: Dialogue,
) -> Outcome:
    accepted = [message.client for message in updates.messages]
    losses = {(reply.client, reply.payload): reply.train_loss for reply in replies}
    counted = [losses[pair] for pair in zip(accepted, updates.received, strict=True)]
    said = list(filter(math.isfinite, counted))
    failed = [reply.client for reply in replies if reply.failure]
    return Outcome(
        round=round_,
        clients=clients,
        left_out=[client for client in clients if client in {*failed, *talk.left_out}],
        rejected=rejections,
        accepted=accepted,
        updates=updates.hashes,
        train_loss=fmean(said) if said else None,
        payload_bytes_up=talk.bytes_up + sum(len(reply.payload) for reply in replies),
        payload_bytes_down=talk.bytes_down + sum(reply.payload_bytes_down for reply in replies),
        seconds_local=sum(reply.watch["local"] for reply in replies),
        seconds_project=sum(reply.watch["project"] for reply in replies),
        seconds_rebuild=sum(reply.watch["rebuild"] for reply in replies),
        seconds_server=watch["server"],
    )
