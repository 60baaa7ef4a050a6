"""Flower's simulation: many clients take turns in few processes, and leave what they would leave anywhere."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from parties import DirectLink, Party, in_process, own, play, settings, told, weights, worker

from ferret_ext.federated import ledger
from ferret_ext.federated.cli import main
from ferret_ext.federated.engines.flower.link import FlowerLink
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame
from ferret_ext.federated.worker.worker import Worker

CLIENTS = 6
MANY = (f"num_clients={CLIENTS}", "client_fraction=0.5", "rounds=4")


class Turn(Party):
    """A client whose calls go to any of a few workers."""

    def __init__(self, client: int, workers: list[Worker], draw: random.Random) -> None:
        super().__init__(workers[0])
        self.client, self.workers, self.draw = client, workers, draw

    def answer(self, call: Frame) -> Frame:
        chosen = self.draw.choice(self.workers)
        return chosen.greet(self.client) if call["kind"] == "hello" else chosen.answer(call)


def turns(workers: int) -> DirectLink:
    crew, draw = [worker(None) for _ in range(workers)], random.Random(0)
    return DirectLink({100 + client: Turn(client, crew, draw) for client in range(CLIENTS)})


def outcome(folder: Path) -> list[tuple[bytes, object]]:
    """The weights after each round, and the updates that led to them. A worker that has seen less than its
    client is told more than a run in one process counts."""
    return [(record.weights, record.values.get("updates")) for record in ledger.read(folder / "ledger")]


@pytest.mark.parametrize(
    ("workers", "more"),
    [
        (1, []),
        (3, []),
        (3, ["ferret.seeds=shared-round"]),
        (3, ["algorithm=fedavg", "client_weights=examples"]),
    ],
    ids=["one", "three", "shared-round", "fedavg"],
)
def test_clients_that_take_turns_leave_the_bits_of_a_run_in_process(
    tmp_path: Path, workers: int, more: list[str]
) -> None:
    one, two = (settings(tmp_path / name, *MANY, *more) for name in ("one", "two"))
    expected = play(one, None, in_process)[0]  # type: ignore[arg-type]
    result, diary = play(two, turns(workers))
    assert weights(result).equal(weights(expected))
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert diary.left_out == []


def test_a_model_is_loaded_once_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = Worker._begin

    def counted(self: Worker, call: Any) -> Any:
        begun.append(call.client)
        return begin(self, call)

    monkeypatch.setattr(Worker, "_begin", counted)
    play(settings(tmp_path, *MANY), turns(2))
    assert len(begun) == 2


def test_an_optimiser_cannot_be_kept_where_clients_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, diary = play(settings(tmp_path / "run", "rounds=1", "client_fraction=1"), turns(1))
    assert diary.left_out == []
    arguments = [
        "flower-init",
        str(tmp_path / "app"),
        "--simulation",
        "--out",
        "o",
        "training.keep_state=true",
    ]
    assert main([*arguments, "--model", "m", "--data", "d"]) == 2
    assert "training.keep_state: expected false with --simulation, got true" in capsys.readouterr().err
    call = {"kind": "train", "run": bytes(8), "round": 1, "client": 0, "since": 0, "broadcasts": []}
    told_to = {**call, "settings": '{"training": {"keep_state": true}}', "base": bytes(32)}
    assert "training.keep_state: expected false" in str(worker(None).answer(told_to)["text"])


# ---- Flower's messages ----


class Grid:
    """Hands messages to a ClientApp in this process, as a process of the simulation does."""

    def __init__(self, app: Any, settings: dict[str, Any]) -> None:
        with suppress(ImportError):  # newer versions want a process to know its run before it makes messages
            from flwr.supercore.task_identity import TaskIdentity

            TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._app, self._settings = app, settings
        self._replies: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return [1000 + client for client in range(CLIENTS)]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        from flwr.app import Context, RecordDict

        names = []
        for message in messages:
            place: Any = {"partition-id": message.metadata.dst_node_id - 1000, "num-partitions": CLIENTS}
            context = Context(1, message.metadata.dst_node_id, place, RecordDict(), self._settings)
            names.append(str(len(self._replies)))
            message.metadata.__dict__["_message_id"] = names[-1]
            self._replies[names[-1]] = self._app(message, context)
        return names

    def pull_messages(self, names: Collection[str]) -> list[Any]:
        return [self._replies[name] for name in names if self._replies.get(name)]


def test_the_client_app_speaks_flowers_messages(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="flwr is not installed (pip install '.[flower]')")
    from ferret_ext.federated.engines.flower.simulation import client_app

    one, two = (settings(tmp_path / name, *MANY) for name in ("one", "two"))
    play(one, None, in_process)  # type: ignore[arg-type]
    grid: Any = Grid(client_app(), {**dict(own()), "rounds": 4, "training.max_steps": 1})
    _, diary = play(two, FlowerLink(grid))
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert diary.left_out == []
    assert told(tmp_path / "two") == told(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.flower
def test_flowers_simulation_leaves_the_weights_of_a_run_in_process(tmp_path: Path) -> None:
    """`flwr run` with Ray, and `ferret simulate`: the script compares the two itself."""
    pytest.importorskip("ray", reason="ray is not installed (pip install 'flwr[simulation]')")
    script = Path(__file__).parents[2] / "benchmarks" / "simulate_many.py"
    command = [sys.executable, str(script), "--clients", "20", "--chosen", "4", "--rounds", "2"]
    subprocess.run(command, check=True, timeout=900)


def test_hello_names_the_client() -> None:
    assert worker(None).greet(4) == calls.hello(4, bytes(8), 0)
    assert worker(2).greet() == calls.hello(2, bytes(8), 0)
