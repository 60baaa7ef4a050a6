"""What a round takes of the bytes that clients sent, and what it rejects, one by one and with its reason."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashes import Watcher
from federation import flat, toy
from tampering import MAKERS, Listener, changed, first_array, multiplied, seed_of, with_number
from toy import examples

from ferret_ext.federated import digests, ledger, wire
from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.client import OptimizerStates
from ferret_ext.federated.config import LedgerConfig, SimulationConfig
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation
from ferret_ext.federated.journal import Genesis, outcome_of
from ferret_ext.federated.metrics import Rejection, RoundMetrics, Stopwatch
from ferret_ext.federated.report import RunFolder
from ferret_ext.federated.rounds import run_rounds
from ferret_ext.federated.server import Server

BAD, ROUND = 2, 2  # who misbehaves, and when
RUN = b"the run."
Payloads = dict[int, dict[int, bytes]]  # by round and client
Tamper = Callable[[Payloads], list[tuple[int, bytes]]]  # what is sent in place of BAD's update in ROUND


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def shorter(payload: bytes) -> bytes:
    name, array = first_array(payload)
    return changed(payload, {name: array[:-1]})


def wider(payload: bytes) -> bytes:
    name, array = first_array(payload)
    return changed(payload, {name: array.astype(np.float64)})


def dissent(payload: bytes, **fields: Any) -> bytes:
    """A dissent about the weights after round 1 that says what the server says, or something else."""
    params = played("ferret").weights[1]
    each = fields.pop("each", b"".join(digests.of_each(params)))
    update = wire.decode(payload)
    values = {"digests": np.frombuffer(each, np.uint8)}
    return wire.encode(dataclasses.replace(update, kind="dissent", values=values, **fields))


# What the bad client sends and why it is rejected; the ones for any algorithm, then those about seeds.
ALIKE: dict[str, tuple[Callable[[bytes, Payloads], bytes], str]] = {
    "nothing": (lambda own, sent: b"", "message must have at least"),
    "torn": (lambda own, sent: own[:-5], "checksum must be|may be cut short"),
    "flipped": (lambda own, sent: own[:60] + bytes([own[60] ^ 1]) + own[61:], "checksum must be"),
    "longer": (lambda own, sent: sealed(own[:-4] + b"more"), "must end after its payloads, got 4 more"),
    "shape": (lambda own, sent: shorter(own), r"as float32 of shape \[\d+\], got float32 of shape \[\d+\]"),
    "dtype": (lambda own, sent: wider(own), "as float32 of shape .*, got float64"),
    "missing": (
        lambda own, sent: wire.encode(dataclasses.replace(wire.decode(own), values={})),
        "must have contract, got none|expected 4 tensors, got 0",
    ),
    "plan": (lambda own, sent: changed(own, digest=b"another."), "must have digest .*, got 616e6f74"),
    "nan": (lambda own, sent: with_number(own, float("nan")), "must be finite, 1 elements are not"),
    "infinity": (lambda own, sent: with_number(own, float("-inf")), "must be finite, 1 elements are not"),
    "norm": (lambda own, sent: multiplied(own, 1e6), "norm must be at most .*, got"),
    "largest": (lambda own, sent: multiplied(own, 1e35), "norm must be at most .*, got"),
    "weight": (lambda own, sent: changed(own, weight=1e6), "weight must be at most 1000, got 1e.06"),
    "overflow": (lambda own, sent: changed(own, weight=1.7e308), r"must have weight in \[2.-64, 2.64\]"),
    "underflow": (lambda own, sent: changed(own, weight=5e-324), r"must have weight in \[2.-64, 2.64\]"),
    "late": (lambda own, sent: sent[1][BAD], "update must have round 2, got 1"),
    "early": (lambda own, sent: changed(own, round=3), "update must have round 2, got 3"),
    "relabelled": (lambda own, sent: changed(sent[1][BAD], round=2), "must have (digest|weights)"),
    "another run": (lambda own, sent: changed(own, run=b"another."), "must have run 7468652072756e2e, got"),
    "another base": (lambda own, sent: changed(own, weights=b"another."), "must have weights .*, got 616e6f"),
    "algorithm": (lambda own, sent: changed(own, algorithm="ours"), "must have algorithm .*, got ours"),
    "broadcast": (lambda own, sent: changed(own, kind="broadcast"), "must have kind update, got broadcast"),
    "in another's name": (lambda own, sent: sent[2][0], "client 2 sent a message in the name of client 0"),
}
FERRETS: dict[str, tuple[Callable[[bytes, Payloads], bytes], str]] = {
    "seed of another": (
        lambda own, sent: changed(own, {"seed": seed_of(sent[2][0])}),
        r"client 2's update must have a new seed, got \d+ again",
    ),
    "seed of a former round": (
        lambda own, sent: changed(own, {"seed": seed_of(sent[1][1])}),
        r"client 2's update must have a new seed, got \d+ again",
    ),
    "more than is asked for": (
        lambda own, sent: changed(own, {"more": bytes(10**6)}),
        "must have no values but contract, seed, gammas, got more",
    ),
    "dissent of nothing": (lambda own, sent: dissent(own), "dissent has the same digests as the server"),
    "dissent of another round": (
        lambda own, sent: dissent(own, each=bytes(32), round=1),
        "dissent must have round 2, got 1",
    ),
    "dissent of another run": (
        lambda own, sent: dissent(own, each=bytes(32), run=bytes(8)),
        "dissent must have run 7468652072756e2e",
    ),
    "dissent of another plan": (
        lambda own, sent: dissent(own, each=bytes(32), digest=bytes(8)),
        "dissent must have digest",
    ),
    "dissent without digests": (
        lambda own, sent: dissent(own, each=bytes(31)),
        r"must have digests as uint8 of shape \[32\], got uint8 of shape \[31\]",
    ),
}


@dataclasses.dataclass
class Played:
    """A run of three rounds: what was sent in it, its weights after each round and its metrics."""

    sent: Payloads
    weights: list[list[torch.Tensor]]
    history: list[RoundMetrics]
    watched: list[Rejection]

    @property
    def final(self) -> torch.Tensor:
        return flat(self.weights[-1])


def play(name: str, tamper: Tamper | None = None, clients: int = 4, fraction: float = 1.0) -> Played:
    """Three rounds. In the second, what BAD sends is replaced by what `tamper` makes of all that was sent."""
    algorithm = MAKERS[name]()
    members = InProcessClients(algorithm, toy(), [examples(1)] * clients, [1.0] * clients, seed=0)
    server = Server(algorithm, toy(), range(clients), fraction, 0, run=RUN)
    sent: Payloads = defaultdict(dict)
    weights, listener = [], Listener()

    def exchange(round_: int, chosen: list[int], server: Server[Any]) -> list[Reply]:
        replies = members.exchange(listener, round_, chosen, server)
        sent[round_] = {reply.client: reply.payload for reply in replies}
        if round_ != ROUND or tamper is None:
            return replies
        (bad,) = (reply for reply in replies if reply.client == BAD)
        instead = [dataclasses.replace(bad, client=c, payload=p) for c, p in tamper(sent)]
        return [reply for reply in replies if reply.client != BAD] + instead

    def evaluate(round_: int, model: Any, watch: Stopwatch) -> Evaluation:
        weights.append([param.detach().clone() for param in model.parameters()])
        return Evaluation(1.0, 1, {}, [])

    history = run_rounds(3, server, exchange, evaluate, listener, 1)
    return Played(sent, weights, history, listener.rejected)


_played: dict[tuple[str, bool], Played] = {}


def played(name: str, without_bad: bool = False) -> Played:
    """The run in which all behave, or in which BAD sends nothing in ROUND."""
    if (name, without_bad) not in _played:
        _played[name, without_bad] = play(name, (lambda sent: []) if without_bad else None)
    return _played[name, without_bad]


CASES = [
    *((name, *case) for name in MAKERS for case in ALIKE.items()),
    *(("ferret", *case) for case in FERRETS.items()),
]


@pytest.mark.parametrize(("name", "case", "made"), CASES, ids=[f"{name} {case}" for name, case, _ in CASES])
def test_a_bad_update_is_rejected_alone(
    name: str, case: str, made: tuple[Callable[[bytes, Payloads], bytes], str]
) -> None:
    """With its reason in the metrics, and the run's weights are those of the others, to the bit."""
    make, reason = made
    run = play(name, lambda sent: [(BAD, make(sent[ROUND][BAD], sent))])
    (rejection,) = run.watched
    assert rejection.client == BAD
    assert re.search(reason, rejection.reason), rejection.reason
    assert [metrics.rejected for metrics in run.history] == [[], [], [rejection], []]
    assert [metrics.left_out for metrics in run.history] == [[]] * 4
    assert torch.equal(run.final, played(name, without_bad=True).final)
    assert not torch.equal(run.final, played(name).final)


@pytest.mark.parametrize("name", MAKERS)
def test_a_duplicate_is_rejected_and_the_first_one_counts(name: str) -> None:
    run = play(name, lambda sent: [(BAD, sent[2][BAD]), (BAD, multiplied(sent[2][BAD], 2)), (BAD, b"")])
    reasons = [rejection.reason for rejection in run.history[2].rejected]
    assert reasons[0] == "client 2 has sent an update for round 2 already"
    assert "message must have at least" in reasons[1]
    assert torch.equal(run.final, played(name).final)
    assert run.history[2].train_loss == played(name).history[2].train_loss


def test_a_client_may_repair_what_was_rejected() -> None:
    run = play("ferret", lambda sent: [(BAD, b"torn"), (BAD, sent[2][BAD])])
    assert [rejection.client for rejection in run.history[2].rejected] == [BAD]
    assert torch.equal(run.final, played("ferret").final)


def test_clients_that_were_not_drawn_are_rejected() -> None:
    honest = play("ferret", clients=8, fraction=0.5)
    assert BAD in honest.history[2].clients
    (idle, *_) = set(range(8)) - set(honest.history[2].clients)

    def tamper(sent: Payloads) -> list[tuple[int, bytes]]:
        own = sent[2][BAD]
        return [(BAD, own), (idle, changed(own, {"seed": 1}, client=idle)), (99, changed(own, client=99))]

    run = play("ferret", tamper, clients=8, fraction=0.5)
    assert run.history[2].rejected == [
        Rejection(idle, f"client {idle} has no part in round 2"),
        Rejection(99, "client 99 has no part in round 2"),
    ]
    assert torch.equal(run.final, honest.final)


def test_rejections_are_in_metrics_jsonl_and_in_the_ledger(tmp_path: Path) -> None:
    """And a run that is resumed from them knows the same."""
    states: OptimizerStates = {}
    genesis = Genesis(bytes(32), "{}")

    def run(rounds: int) -> list[RoundMetrics]:
        config = SimulationConfig(model="toy", data="toy", out=str(tmp_path / "run"), ledger=LedgerConfig())
        folder = RunFolder(config, resume=True)
        watcher = Watcher(folder)
        algorithm = MAKERS["ferret"]()
        members = InProcessClients(algorithm, toy(), [examples(1)] * 3, [1.0] * 3, seed=0)
        server = Server(algorithm, toy(), range(3), 1.0, 0, run=genesis.run)

        def exchange(round_: int, chosen: list[int], server: Server[Any]) -> list[Reply]:
            replies = members.exchange(watcher, round_, chosen, server)
            replies[1] = dataclasses.replace(replies[1], payload=multiplied(replies[1].payload, 1e9))
            return replies

        evaluate = lambda round_, model, watch: Evaluation(1.0, 1, {}, [])  # noqa: E731
        journal = folder.open_journal(genesis, states)
        return run_rounds(rounds, server, exchange, evaluate, watcher, 1, journal)

    history = run(2)
    for metrics in history[1:]:
        (rejection,) = metrics.rejected
        assert rejection.client == 1
        assert re.fullmatch(r"norm must be at most [\d.]+, got [\d.e+]+", rejection.reason)
    rows = [RoundMetrics.of_row(row) for row in _json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert rows == history
    records = list(ledger.read(tmp_path / "run" / "ledger"))
    assert [outcome_of(record).rejected for record in records[1:]] == [m.rejected for m in history[1:]]
    assert [outcome_of(record).accepted for record in records[1:]] == [[0, 2]] * 2
    assert run(3)[:3] == history


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
