"""A worker: what it answers, and that it lives on whatever it is asked."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parties import Leader, ask, own, worker

from ferret_ext.federated import client, run, wire
from ferret_ext.federated.algorithms.base import Algorithm
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame, Train
from ferret_ext.federated.worker.serving import serve
from ferret_ext.federated.worker.worker import Worker, check_own, party_config
from ferret_link import frames


@pytest.fixture
def leader() -> Leader:
    return Leader()


def test_it_keeps_its_place_and_is_told_what_it_has_not_seen(leader: Leader) -> None:
    party = worker(0)
    assert party.greet() == {"kind": "hello", "client": 0, "run": bytes(8), "seen": 0}
    for round_ in range(3):
        leader.take(party.answer(leader.call(since=round_)))
        assert party.greet()["seen"] == round_ + 1
    assert party.greet()["run"] == leader.genesis.run


def test_asked_again_it_answers_as_before_without_training(
    leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = worker(0)
    first = party.answer(leader.call())
    monkeypatch.setattr(client, "make_optimizer", None)
    assert party.answer(leader.call()) == first
    assert party.answer(leader.call(since=1, broadcasts=[])) == first


def test_a_round_that_is_tried_again_begins_with_the_optimiser_as_it_was(leader: Leader) -> None:
    """As after a server's crash, when the cached answer is gone too."""
    party = worker(0)
    for round_ in range(2):
        leader.take(party.answer(leader.call(since=round_)))
    once = party.answer(leader.call(since=2))
    party._last = None
    again = party._update(party._member, Train.read(leader.call(since=2)))  # type: ignore[arg-type]
    assert again["payload"] == once["payload"]
    party._member.kept.clear()  # type: ignore[union-attr]
    forgotten = party._update(party._member, Train.read(leader.call(since=2)))  # type: ignore[arg-type]
    assert forgotten["payload"] != once["payload"]


def test_what_it_lacks_it_says(leader: Leader) -> None:
    party = worker(0)
    assert party.answer(leader.call(since=1)) == calls.behind(0)
    leader.take(party.answer(leader.call()))
    assert party.answer(leader.call(since=2)) == calls.behind(1)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"client": 1}, "CallError", "client: expected 0, which this worker is, got 1"),
        ({"client": -1}, "CallError", r"client: expected a whole number in \[0, 2\^32\), got -1"),
        ({"round": "1"}, "CallError", "round: expected int, got str"),
        ({"round": True}, "CallError", "round: expected int, got bool"),
        ({"run": b"123"}, "CallError", "run: expected 8 bytes, got 3"),
        ({"run": bytes(8)}, "CallError", "run: expected [0-9a-f]{16} by its settings, got 0000000000000000"),
        ({"broadcasts": ["text"]}, "CallError", "broadcasts: expected a list of bytes"),
        ({"broadcasts": [b"FRET"]}, "WireError", "message must have at least"),
        ({"settings": "no JSON"}, "ConfigError", "settings: expected those of a run as JSON"),
        ({"settings": "[1]"}, "ConfigError", "settings: expected those of a run as JSON"),
        ({"settings": '{"rounds": -1}'}, "ConfigError", "rounds: expected an integer >= 1"),
        ({"settings": '{"nonsense": 1}'}, "ConfigError", "nonsense: no such setting"),
        ({"base": bytes(32)}, "ConfigError", "model: expected the run's base of SHA-256 0000"),
    ],
)
def test_bad_calls_are_answered_and_survived(leader: Leader, changes: Frame, kind: str, text: str) -> None:
    party = worker(0)
    answer = party.answer(leader.call(**changes))
    assert (answer["kind"], answer["type"]) == ("error", kind)
    assert re.search(text, answer["text"]), answer["text"]
    leader.take(party.answer(leader.call()))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=5),
    st.binary(max_size=9),
    st.lists(st.binary(), max_size=2),
)


@given(
    st.dictionaries(
        st.sampled_from(["kind", "run", "round", "client", "since", "broadcasts", "settings"]), VALUES
    )
)
def test_any_call_has_an_answer(call: Frame) -> None:
    answer = worker(0).answer(call)
    assert answer["kind"] in ("error", "behind")
    frames.encode(answer)


def test_missing_data_is_said_and_may_be_mended(leader: Leader, tmp_path: Path) -> None:
    late = tmp_path / "late.jsonl"
    party = Worker(0, [*own(), ("data", str(late))], lambda _: None)
    assert "late.jsonl" in party.answer(leader.call())["text"]
    late.write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 3)
    leader.take(party.answer(leader.call()))


@pytest.mark.parametrize(
    "problem",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")],
    ids=repr,
)
@pytest.mark.parametrize("where", ["train", "load", "rebuild"])
def test_out_of_memory_is_an_answer_and_the_next_round_works(
    leader: Leader, monkeypatch: pytest.MonkeyPatch, problem: BaseException, where: str
) -> None:
    """The weights that it goes on with are the server's: their digests are compared in every round."""
    party = worker(0)
    leader.take(party.answer(leader.call()))

    def fail(*_: Any, **__: Any) -> None:
        raise problem

    owner, name = {
        "train": (torch.optim.SGD, "step"),
        "load": (run, "begin"),
        "rebuild": (type(leader.server.algorithm), "advance"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        answer = party.answer(leader.call(since=0 if where == "load" else 1))
    assert (answer["kind"], answer["type"]) == ("error", type(problem).__name__)
    seen = party.greet()["seen"]
    assert seen == (2 if where == "train" else 0)
    leader.take(party.answer(leader.call(since=1 if seen else 0)))


def test_weights_are_not_kept_where_a_rebuild_stopped_half_way(
    leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two broadcasts are due, and memory runs out in the second."""
    one, two = worker(0), worker(0)
    first = one.answer(leader.call())
    two.answer(leader.call())
    leader.take(first)
    leader.take(one.answer(leader.call(since=1)))
    kind = type(leader.server.algorithm)
    advance, count = kind.advance, iter(range(9))

    def second_fails(algorithm: Algorithm[Any], replica: Any, broadcast: Any) -> None:
        if next(count):
            replica.params[0].data.zero_()
            raise MemoryError
        advance(algorithm, replica, broadcast)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "advance", second_fails)
        assert two.answer(leader.call(since=1))["type"] == "MemoryError"
    assert two.answer(leader.call(since=1)) == calls.behind(0)
    leader.take(two.answer(leader.call()))


def test_other_weights_than_the_servers_are_a_dissent(leader: Leader) -> None:
    party = worker(0)
    leader.take(party.answer(leader.call()))
    party._member.members.replica.start[0].add_(1)  # type: ignore[union-attr]
    answer = party.answer(leader.call(since=1))
    assert wire.decode(answer["payload"]).kind == "dissent"


def test_own_records_are_all_trained_on(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    train = LocalTrainer.train

    def counted(self: LocalTrainer, model: Any, examples: Any, *rest: Any) -> float:
        counts.append(len(examples))
        return train(self, model, examples, *rest)

    monkeypatch.setattr(LocalTrainer, "train", counted)
    three = Leader("num_clients=3")
    for share in (False, True):
        worker(0, share=share).answer(three.call())
    assert counts == [24, 8]


def test_a_share_that_is_not_there_is_refused(leader: Leader) -> None:
    assert (
        "client: expected at most 0, the last share, got 4" in worker(4).answer(leader.call(client=4))["text"]
    )


# ---- settings ----


def test_a_server_cannot_say_what_is_opened_on_a_partys_machine() -> None:
    theirs = {
        "model": "evil",
        "data": "/etc",
        "allow_pickle": True,
        "device": "cuda:7",
        "num_threads": 99,
        "rounds": 7,
        "dataset": {"labels_file": "/etc/passwd", "task_lists": "/etc", "max_length": 33},
    }
    config = party_config(json.dumps(theirs), own())
    mine = dict(own())
    assert (config.model, config.data) == (mine["model"], mine["data"])
    assert (config.allow_pickle, config.device, config.num_threads) == (False, "auto", 1)
    assert (config.dataset.labels_file, config.dataset.task_lists) == (None, "default")
    assert (config.rounds, config.dataset.max_length) == (7, 33)


@pytest.mark.parametrize("key", ["rounds", "seed", "ferret.K", "training.learning_rate", "robust.quorum"])
def test_a_party_cannot_set_what_is_the_servers(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected a setting that a party has for itself"):
        check_own([*own(), (key, "1")])


def test_a_party_needs_model_and_data() -> None:
    with pytest.raises(ConfigError, match="data: expected a value, got none"):
        check_own([("model", "builtin:tiny-llama")])


# ---- at its socket ----


@pytest.fixture
def served(tmp_path: Path) -> tuple[Path, Worker]:
    party = worker(0)
    path = tmp_path / "private" / "socket"
    thread = threading.Thread(target=serve, args=(party, path, 1 << 20), daemon=True)
    thread.start()
    limit = time.monotonic() + 60
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    return path, party


def test_rounds_over_the_socket(served: tuple[Path, Worker], leader: Leader) -> None:
    path, _ = served
    for round_ in range(2):
        leader.take(ask(path, leader.call(since=round_)))
    assert ask(path, {"kind": "hello"})["seen"] == 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x05\0\0\0hello", "FrameError"),
        (b"\xff\xff\xff\xff", "must have at most 1048576 bytes"),
        (frames.encode({"kind": "dance"}), "kind: expected hello, train or ask, got 'dance'"),
        (frames.encode({}), "kind: expected hello, train or ask, got None"),
    ],
)
def test_what_is_no_call_is_answered_and_others_are_heard(
    served: tuple[Path, Worker], data: bytes, text: str
) -> None:
    with frames.connect(served[0], timeout=60) as connection:
        connection.sendall(data)
        answer = frames.receive(connection)
    assert answer is not None
    assert text in f"{answer['type']}: {answer['text']}"
    assert ask(served[0], {"kind": "hello"})["client"] == 0


def test_a_connection_that_goes_away_disturbs_nobody(served: tuple[Path, Worker], leader: Leader) -> None:
    with frames.connect(served[0], timeout=60) as connection:
        frames.send(connection, leader.call())
    first = ask(served[0], leader.call())
    assert first["kind"] == "reply"


def test_a_hello_is_answered_while_the_worker_trains(
    served: tuple[Path, Worker], leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on for as long as it takes to answer one hello, and then some. Operators and torch let
    other threads run: less than a second of the process's time goes by, however little of the machine it
    gets."""
    begun, answered, waits = threading.Event(), threading.Event(), []
    train = LocalTrainer.train

    def long(self: LocalTrainer, model: Any, *rest: Any) -> float:
        begun.set()
        assert answered.wait(60)
        for _ in range(20):
            loss = train(self, model, *rest)
        return loss

    monkeypatch.setattr(LocalTrainer, "train", long)
    thread = threading.Thread(target=ask, args=(served[0], leader.call()))
    thread.start()
    assert begun.wait(60)
    while thread.is_alive():
        start = time.process_time()
        assert ask(served[0], {"kind": "hello"})["client"] == 0
        waits.append(time.process_time() - start)
        answered.set()
    assert len(waits) > 3
    assert max(waits) < 1
