"""The round loop (arXiv 2409.06277, algorithm 1), on whatever engine carries the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Protocol

from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.client import DivergedError
from ferret_ext.federated.evaluation import Evaluation, Sample
from ferret_ext.federated.metrics import RoundMetrics, Stopwatch
from ferret_ext.federated.server import Server
from ferret_ext.federated.wire import NotFiniteError


class Watcher(Protocol):
    """Whoever wants to see a run go by."""

    def round_begins(self, round_: int, clients: list[int]) -> None: ...

    def client_done(self, round_: int, client: int) -> None: ...

    def client_left_out(self, round_: int, client: int, reason: str) -> None: ...

    def round_ends(self, metrics: RoundMetrics, samples: Sequence[Sample]) -> None: ...


Exchange = Callable[[int, list[int], Server[Any]], list[Reply]]  # round, its clients, server -> their replies
Evaluate = Callable[[int, Any, Stopwatch], Evaluation]  # round, model -> loss, scores and samples


def run_rounds(
    rounds: int,
    server: Server[Any],
    exchange: Exchange,
    evaluate: Evaluate,
    watcher: Watcher,
    model_bytes: int,
) -> list[RoundMetrics]:
    """Rounds 1 .. `rounds`; returns the metrics of each, after those of the untrained model as round 0.

    A client whose training fails is left out of its round, whose mean is that of the others. Raises
    DivergedError where that leaves none, or where the evaluation's numbers are no longer finite.

    for r = 1 .. R:
        the server draws the round's clients
        each client: rebuilds w_{r-1} from what the server relays, trains T steps, sends its update
        the server: w_r = w_{r-1} - server_learning_rate * mean of the updates
    """

    def measure(round_: int, clients: list[int], replies: list[Reply], watch: Stopwatch) -> RoundMetrics:
        try:
            evaluation = evaluate(round_, server.replica.model, watch)
        except DivergedError as error:
            cause = "lower the learning rates" if round_ else "the model is broken before any training"
            raise DivergedError(f"round {round_}: {error}; {cause}") from None
        metrics = _metrics(round_, clients, replies, evaluation, watch, model_bytes)
        watcher.round_ends(metrics, evaluation.samples)
        return metrics

    history = [measure(0, [], [], Stopwatch())]
    for round_ in range(1, rounds + 1):
        watch = Stopwatch()
        clients = server.choose(round_)
        watcher.round_begins(round_, clients)
        replies = exchange(round_, clients, server)
        payloads = [reply.payload for reply in replies if not reply.failure]
        if not payloads:
            raise DivergedError(f"every client in round {round_}: {replies[0].failure}")
        try:
            with watch("server"):
                server.apply(payloads)
        except NotFiniteError as error:
            raise DivergedError(f"round {round_}: {error}; lower server_learning_rate") from None
        history.append(measure(round_, clients, replies, watch))
    return history


def _metrics(
    round_: int,
    clients: list[int],
    replies: list[Reply],
    evaluation: Evaluation,
    watch: Stopwatch,
    model_bytes: int,
) -> RoundMetrics:
    losses = [reply.train_loss for reply in replies if not reply.failure]
    return RoundMetrics(
        round=round_,
        clients=clients,
        left_out=[reply.client for reply in replies if reply.failure],
        eval_loss=evaluation.loss,
        train_loss=fmean(losses) if losses else None,
        payload_bytes_up=sum(len(reply.payload) for reply in replies),
        payload_bytes_down=sum(reply.payload_bytes_down for reply in replies),
        model_bytes=model_bytes,
        seconds_local=sum(reply.watch["local"] for reply in replies),
        seconds_project=sum(reply.watch["project"] for reply in replies),
        seconds_rebuild=sum(reply.watch["rebuild"] for reply in replies),
        seconds_server=watch["server"],
        seconds_eval=watch["eval"],
        seconds_generate=watch["generate"],
        scores=evaluation.scores,
    )
