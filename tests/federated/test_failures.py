"""Clients whose training fails, and rounds that go on without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from federation import federate, flat, toy, train
from toy import examples, tiny_model

from ferret_ext.federated.algorithms.base import Algorithm
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret
from ferret_ext.federated.cli import main
from ferret_ext.federated.client import DivergedError, LocalTrainer
from ferret_ext.federated.config import FerretConfig, SimulationConfig, TrainingConfig
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation
from ferret_ext.federated.members import client_weights
from ferret_ext.federated.metrics import RoundMetrics, Stopwatch
from ferret_ext.federated.rounds import Deaf, Evaluate, run_rounds
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError

BAD = {1}


def diverging(model: Any, data: Any, seed: int, client: int = 0) -> float:
    if client in BAD:
        raise DivergedError("training diverged")
    return train(model, data, seed)


def exploding(model: Any, data: Any, seed: int, client: int = 0) -> float:
    """Weights that are finite, and an update that is not: 60000 - (-60000) in float16."""
    loss = train(model, data, seed)
    if client in BAD:
        with torch.no_grad():
            next(model.parameters()).fill_(-60000)
    return loss


def ferret(fit: Any) -> Algorithm[Any]:
    return Ferret(FerretConfig(K=40, coordinates="float32"), 1.0, fit)


def fedavg(fit: Any) -> Algorithm[Any]:
    return FedAvg(1.0, fit)


@pytest.mark.parametrize("make", [ferret, fedavg])
def test_a_diverging_client_is_left_out_of_the_mean(make: Any) -> None:
    """The round is that of the other clients, bit for bit, and the next client starts from clean weights."""
    fed, others = federate(make(diverging)), federate(make(train))
    replies = fed.replies()
    assert [reply.failure for reply in replies] == ["", "training diverged", ""]
    assert replies[1].payload == b""
    assert replies[1].payload_bytes_down == len(fed.server.broadcasts[0])
    kept = [reply.payload for reply in replies if not reply.failure]
    assert kept == [reply.payload for reply in others.replies() if reply.client not in BAD]


def test_an_update_that_overflows_is_a_failure_too() -> None:
    model = toy().half()
    with torch.no_grad():
        next(model.parameters()).fill_(60000)
    reply = federate(fedavg(exploding), model).replies()[1]
    assert "0 must be finite, 63 elements are not" in reply.failure


class Listener(Deaf):
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.left_out: list[tuple[int, int, str]] = []

    def client_left_out(self, round_: int, client: int, reason: str) -> None:
        self.left_out.append((round_, client, reason))


def finite(round_: int, model: Any, watch: Stopwatch) -> Evaluation:
    return Evaluation(1.0, 1, {}, [])


def not_finite(round_: int, model: Any, watch: Stopwatch) -> Evaluation:
    raise DivergedError("expected a finite evaluation loss, got nan")


def play(fit: Any, listener: Listener, evaluate: Evaluate = finite) -> list[RoundMetrics]:
    algorithm = fedavg(fit)
    clients = InProcessClients(algorithm, toy(), [examples(1)] * 3, [1.0] * 3, seed=0)
    server = Server(algorithm, toy(), range(3), 1.0, seed=0)
    return run_rounds(2, server, partial(clients.exchange, listener), evaluate, listener, 1)


def test_clients_left_out_are_logged_and_counted() -> None:
    listener = Listener()
    history = play(diverging, listener)
    assert listener.left_out == [(1, 1, "training diverged"), (2, 1, "training diverged")]
    assert [metrics.left_out for metrics in history] == [[], [1], [1]]
    assert [metrics.clients for metrics in history[1:]] == [[0, 1, 2]] * 2
    losses = [metrics.train_loss for metrics in history[1:]]
    assert all(loss is not None and math.isfinite(loss) for loss in losses)


def fails(model: Any, data: Any, seed: int, client: int = 0) -> float:
    raise DivergedError("training diverged")


def test_the_run_stops_when_every_client_diverges_or_the_global_loss_does() -> None:
    with pytest.raises(DivergedError, match="every client in round 1: training diverged"):
        play(fails, Listener())
    with pytest.raises(DivergedError, match="round 0: expected a finite evaluation loss, got nan"):
        play(train, Listener(), not_finite)


def test_a_mean_that_overflows_stops_the_run() -> None:
    algorithm = FedAvg(1e9, train)
    clients = InProcessClients(algorithm, toy().half(), [examples(1)] * 3, [1.0] * 3, seed=0)
    server = Server(algorithm, toy().half(), range(3), 1.0, seed=0)
    listener = Listener()
    with pytest.raises(DivergedError, match=r"round 1: .* must be finite.*; lower server_learning_rate"):
        run_rounds(1, server, partial(clients.exchange, listener), finite, listener, 1)
    assert flat(server.replica.params).isfinite().all()


def test_only_the_clients_that_take_part_are_drawn() -> None:
    server = Server(fedavg(train), toy(), [0, 2], 1.0, seed=0)
    assert server.choose(1) == [0, 2]


@pytest.mark.parametrize(
    ("by", "size", "expected"),
    [
        ("uniform", 1, [1.0, 1.0]),
        ("examples", 2, [5.0, 2.0]),
        ("batches", 2, [3.0, 1.0]),
        ("auto", 2, [5.0, 2.0]),
    ],
)
def test_clients_count_by_what_the_setting_says(by: Any, size: int, expected: Sequence[float]) -> None:
    shards = [examples(5), examples(2)]
    training = TrainingConfig(per_device_train_batch_size=size)
    config = SimulationConfig(client_weights=by, training=training)
    assert client_weights(config, fedavg(train), shards) == expected
    if by == "auto":
        assert client_weights(config, ferret(train), shards) == [1.0, 1.0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has .."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_said_with_what_helps(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any) -> float:
        raise error

    monkeypatch.setattr(LocalTrainer, "train", too_large)
    assert main(["simulate", *SMALL, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "ferret simulate: error:" in said
    assert "memory" in said
    assert "training.per_device_train_batch_size" in said


def test_other_errors_take_one_line_and_their_trace_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("a bug\nand more of it")

    monkeypatch.setattr(LocalTrainer, "train", broken)
    assert main(["simulate", *SMALL, "--out", str(tmp_path / "run")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "ferret simulate: internal error: RuntimeError: a bug; --debug shows where"
    with pytest.raises(RuntimeError, match="a bug"):
        main(["simulate", *SMALL, "--out", str(tmp_path / "again"), "--debug"])


def test_a_model_that_cannot_be_checkpointed_is_a_setting_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    trainer = LocalTrainer(TrainingConfig(gradient_checkpointing=True), 0)
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: expected false: Llama"):
        trainer.train(model, examples(1), 0)
