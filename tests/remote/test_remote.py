"""Rounds with clients elsewhere: the same bits as in one process, and what goes wrong on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parties import DirectLink, Party, in_process, lost, no_worker, play, settings, told, weights, worker

from ferret_ext.federated import ledger
from ferret_ext.federated.config import FederationConfig, SimulationConfig
from ferret_ext.federated.engines.remote import Deadlines, Roster
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.run import Result
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame


def parties(count: int = 3) -> DirectLink:
    return DirectLink({100 + client: Party(worker(client)) for client in range(count)})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone")
    return out, play(settings(out), parties(), in_process)[0]


def assert_same(out: Path, result: Result, alone: tuple[Path, Result]) -> None:
    assert torch.equal(weights(result), weights(alone[1]))
    assert (out / "ledger").read_bytes() == (alone[0] / "ledger").read_bytes()
    assert told(out) == told(alone[0])


def test_a_run_over_a_link_has_the_bits_of_one_in_process(tmp_path: Path, alone: Any) -> None:
    result, diary = play(settings(tmp_path), parties())
    assert_same(tmp_path, result, alone)
    assert diary.left_out == []


@pytest.mark.parametrize(
    "more",
    [
        ["algorithm=fedavg", "client_weights=examples"],
        ["training.keep_state=true", "training.momentum=0.9", "rounds=4"],
        ["ferret.seeds=shared-round", "ferret.coordinates=int8"],
        ["algorithm=fedkseed", "zeroth_order.steps=2", "zeroth_order.candidate_seeds=16"],
    ],
    ids=["fedavg", "momentum", "shared-round", "fedkseed"],
)
def test_every_kind_of_run_has_the_bits_of_one_in_process(tmp_path: Path, more: list[str]) -> None:
    one, two = (settings(tmp_path / name, *more) for name in ("one", "two"))
    expected = play(one, parties(), in_process)[0]
    result, _ = play(two, parties())
    assert_same(tmp_path / "two", result, (tmp_path / "one", expected))


def test_a_server_that_died_goes_on_with_the_same_workers(tmp_path: Path, alone: Any) -> None:
    """It dies in round 3, once a client has trained in it; the worker answers again without training."""
    link, config = parties(), settings(tmp_path)

    def die(call: Frame) -> Frame | None:
        if call.get("round") == 3:
            party.worker.answer(call)
            raise KeyboardInterrupt
        return None

    round_three = [record for record in ledger.read(alone[0] / "ledger") if record.round == 3]
    last = round_three[0].array("clients", "<u4", (2,)).tolist()[-1]
    party = link.parties[100 + last]
    party.before = die
    with pytest.raises(KeyboardInterrupt):
        play(config, link)
    party.before = lambda call: None
    result, diary = play(config, link)
    assert torch.equal(weights(result), weights(alone[1]))
    assert [metrics.round for metrics in diary.metrics] == [3]
    for mine, other in zip(*(ledger.read(path / "ledger") for path in (tmp_path, alone[0])), strict=True):
        assert mine.values.get("updates") == other.values.get("updates")


def test_workers_that_died_begin_anew(tmp_path: Path, alone: Any) -> None:
    link = parties()

    def forget(call: Frame) -> Frame | None:
        if call.get("round") == 2:
            for client, party in enumerate(link.parties.values()):
                party.worker = worker(client)
                party.before = lambda call: None
        return None

    for party in link.parties.values():
        party.before = forget
    result, diary = play(settings(tmp_path), link)
    assert torch.equal(weights(result), weights(alone[1]))
    assert diary.left_out == []


def test_a_node_that_comes_back_under_another_name_is_called_there(tmp_path: Path, alone: Any) -> None:
    link = parties()

    def move(call: Frame) -> Frame | None:
        if call.get("round") != 2:
            return None
        for node in list(link.parties):
            link.parties[node + 100] = link.parties.pop(node)
            link.parties[node + 100].before = lambda call: None
        return lost(call)

    for party in link.parties.values():
        party.before = move
    result, diary = play(settings(tmp_path), link)
    assert_same(tmp_path, result, alone)
    assert "client 0 is no longer connected" in diary.lines


def test_a_call_that_failed_on_its_way_is_repeated(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferret_ext.federated.engines.remote.RETRY", 0.01)
    link = parties()
    failures = iter([no_worker] * 4)
    for party in link.parties.values():
        party.before = lambda call: next(failures, lambda _: None)(call) if call["kind"] == "train" else None
    result, diary = play(settings(tmp_path), link)
    assert_same(tmp_path, result, alone)
    assert sum("is called again: no worker answers" in line for line in diary.lines) == 4


def slow(*more: str) -> list[str]:
    return [
        *("client_fraction=1", "federation.min_deadline=0.05", "federation.max_deadline=0.5"),
        *("federation.deadline_factor=1", "federation.join_timeout=0.1", *more),
    ]


def test_a_client_that_does_not_answer_is_left_out_after_the_deadline(tmp_path: Path) -> None:
    link = parties()
    link.parties[101].before = lambda call: lost(call) if call["kind"] == "train" else None
    _, diary = play(settings(tmp_path, *slow("robust.quorum=2")), link)
    assert [(round_, client) for round_, client, _ in diary.left_out] == [(1, 1), (2, 1), (3, 1)]
    assert all(reason.startswith("no reply within") for *_, reason in diary.left_out)
    assert [metrics.left_out for metrics in diary.metrics[1:]] == [[1]] * 3


def test_a_lost_call_of_the_first_round_is_repeated_long_before_its_deadline(tmp_path: Path) -> None:
    """Whose deadline is max_deadline, as nobody knows yet how long clients take."""
    link = parties()
    losses = iter([lost])
    link.parties[101].before = lambda call: (
        next(losses, lambda _: None)(call) if call["kind"] == "train" else None
    )
    config = settings(tmp_path, *slow("robust.quorum=3", "federation.max_deadline=600", "rounds=1"))
    _, diary = play(config, link)
    assert diary.left_out == []
    assert [call["kind"] for call in link.parties[101].calls] == ["hello", "train", "train"]


def test_the_longer_nobody_answers_the_rarer_a_call_is_repeated(tmp_path: Path) -> None:
    """After 0.05, 0.1, 0.2 .. seconds: in 2 s of which at most 6 are over."""
    link = parties()
    link.parties[101].before = lambda call: lost(call) if call["kind"] == "train" else None
    config = settings(tmp_path, *slow("robust.quorum=3", "federation.max_deadline=2", "rounds=1"))
    with pytest.raises(QuorumError):
        play(config, link)
    assert 2 <= sum(call["kind"] == "train" for call in link.parties[101].calls) <= 7


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (1, "client 0 is connected"),
        (3, "clients 0, 1, 2 are connected"),
        (12, "clients 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more are connected"),
    ],
)
def test_who_connects_is_told_in_one_line(count: int, line: str) -> None:
    lines: list[str] = []
    link = parties(count)
    Roster(link, count, bytes(8), lines.append).look(0.0)
    assert lines == [line]


def test_a_node_that_is_slow_to_say_who_it_is_is_heard_at_last() -> None:
    """Each of its answers comes after the patience with it is over, and it is asked ever more rarely."""
    link, lines = parties(1), list[str]()
    heard: list[str] = []

    class Slow(DirectLink):
        def receive(self, names: Any) -> Any:
            return super().receive([name for name in names if name in heard])

    slow_link = Slow(link.parties)
    roster, calls_ = Roster(slow_link, 1, bytes(8), lines.append), link.parties[100].calls
    for now, asked in ((0, 1), (59, 1), (61, 2), (122, 2), (182, 3), (300, 3)):
        roster.look(now)
        assert len(calls_) == asked
    heard += ["1", "2"]
    roster.look(301)
    assert roster.node_of == {0: 100}
    heard.append("3")
    roster.look(1000)
    assert (len(calls_), lines) == (3, ["client 0 is connected"])


def test_a_client_that_never_connects_is_left_out(tmp_path: Path) -> None:
    _, diary = play(settings(tmp_path, *slow()), parties(2))
    assert diary.left_out[0] == (1, 2, "not connected")


def test_too_few_updates_stop_the_run_which_can_be_resumed(tmp_path: Path) -> None:
    config, link = settings(tmp_path, *slow("robust.quorum=3")), parties()
    link.parties[101].before = lambda call: lost(call) if call.get("round") == 2 else None
    with pytest.raises(
        QuorumError, match=r"round 2: expected updates of at least 3 clients within 0.5 s, got 2"
    ):
        play(config, link)
    link.parties[101].before = lambda call: None
    _, diary = play(config, link)
    assert [metrics.round for metrics in diary.metrics] == [2, 3]


def test_a_late_reply_is_counted_and_not_taken(tmp_path: Path) -> None:
    link = parties()
    held: list[Any] = []

    class Slow(DirectLink):
        """Holds back the answer of node 102 in round 1 until round 2."""

        def send(self, node: int, frame: Frame) -> str | None:
            name = super().send(node, frame)
            if node == 102 and frame.get("round") == 1:
                held.append(name)
            elif frame.get("round") == 2:
                held.clear()
            return name

        def receive(self, names: Any) -> Any:
            return super().receive([name for name in names if name not in held])

    _, diary = play(settings(tmp_path, *slow("rounds=2")), Slow(link.parties))
    assert [metrics.late for metrics in diary.metrics] == [0, 0, 1]
    assert diary.metrics[1].left_out == [2]
    assert "client 2: a reply of round 1 came late" in diary.lines


def test_a_repeated_calls_second_reply_is_not_late(tmp_path: Path) -> None:
    """The first answer of node 102 comes when it has been called twice, the second in round 2."""
    link, count = parties(), 0
    held: list[Any] = []

    class Repeated(DirectLink):
        def send(self, node: int, frame: Frame) -> str | None:
            nonlocal count
            name = super().send(node, frame)
            if node == 102 and frame.get("round") == 1:
                held[:] = [name]
                count += 1
            elif frame.get("round") == 2:
                held.clear()
            return name

        def receive(self, names: Any) -> Any:
            return super().receive([name for name in names if name not in held])

    config = settings(tmp_path, *slow("rounds=3", "robust.quorum=3", "federation.max_deadline=600"))
    _, diary = play(config, Repeated(link.parties))
    assert count == 2
    assert [metrics.late for metrics in diary.metrics] == [0, 0, 0, 0]
    assert diary.left_out == []


def test_over_selection_ends_a_round_with_the_first_replies(tmp_path: Path) -> None:
    link = parties()
    link.parties[100].before = lambda call: lost(call) if call["kind"] == "train" else None
    more = ["federation.over_selection=0.5", "federation.max_deadline=60"]
    _, diary = play(settings(tmp_path, *more), link)
    for metrics in diary.metrics[1:]:
        assert metrics.clients == [0, 1, 2]
        assert metrics.left_out == [0]


@pytest.mark.parametrize(
    "answer",
    [
        {"kind": "reply"},
        {"kind": "reply", "payload": "text", "train_loss": 0.0, "failure": "", "local": 0.0},
        {"kind": "behind", "seen": 4},
        {"kind": "behind", "seen": -1},
        {"kind": "nonsense"},
        {},
        {"kind": "error", "type": "MemoryError", "text": "out of\nmemory\x1b[31m" + "x" * 5000},
    ],
    ids=str,
)
def test_answers_that_make_no_sense_cost_their_client_the_round(tmp_path: Path, answer: Frame) -> None:
    link = parties()
    link.parties[100].before = lambda call: dict(answer) if call["kind"] == "train" else None
    _, diary = play(settings(tmp_path, "rounds=1", "client_fraction=1"), link)
    ((_, client, reason),) = diary.left_out
    assert client == 0
    assert len(reason) <= calls.MAX_TEXT
    assert reason.isprintable()
    assert diary.metrics[1].left_out == [0]


def test_numbers_out_of_all_bounds_are_not_summed(tmp_path: Path) -> None:
    link = parties()

    def boast(call: Frame) -> Frame | None:
        if call["kind"] == "hello":
            return None
        answer = party.worker.answer(call)
        return {**answer, "train_loss": 1e308, "local": 1e300, "project": -1.0}

    for party in list(link.parties.values())[:1]:
        party.before = boast
    _, diary = play(settings(tmp_path, "rounds=1", "client_fraction=1"), link)
    assert diary.metrics[1].train_loss is not None
    assert diary.metrics[1].train_loss < 100
    assert 0 <= diary.metrics[1].seconds_local < 1e6


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"kind": "hello", "client": 7, "run": bytes(8), "seen": 0}, "expected a client of 0 to 2, got 7"),
        ({"kind": "hello", "client": "1", "run": bytes(8), "seen": 0}, "client: expected int, got str"),
        ({"kind": "hello", "client": 1, "run": bytes(8), "seen": 0}, "client 1 is connected elsewhere"),
        ({"kind": "error", "type": "NoWorker", "text": "none"}, "NoWorker: none"),
    ],
)
def test_nodes_that_are_nobody_are_not_heard(tmp_path: Path, answer: Frame, said: str) -> None:
    link = parties()
    link.parties[900] = Party(worker(1))
    link.parties[900].before = lambda call: answer
    _, diary = play(settings(tmp_path, "rounds=1", "client_fraction=1"), link)
    assert f"a node is not heard: {said}" in diary.lines
    assert [call["kind"] for call in link.parties[900].calls] == ["hello"]
    assert diary.left_out == []


# ---- deadlines ----


def deadlines(**config: float) -> Deadlines:
    return Deadlines(FederationConfig(**config))


def test_without_replies_the_deadline_is_the_longest() -> None:
    assert deadlines(max_deadline=77.0).seconds == 77


def test_the_deadline_is_a_multiple_of_the_slowest_tenths_time() -> None:
    """Of 1 .. 10 seconds nine tenths take at most 9."""
    rule = deadlines(deadline_factor=2.0, min_deadline=1.0)
    for seconds in range(1, 11):
        rule.note(1, float(seconds))
    assert rule.seconds == 18


def test_a_call_is_waited_for_longer_each_time_until_there_are_reply_times() -> None:
    rule = deadlines(min_deadline=30.0, max_deadline=200.0, deadline_factor=3.0)
    assert [rule.patience(calls) for calls in range(1, 5)] == [30, 60, 120, 200]
    rule.note(1, 20.0)
    assert rule.patience(1) == rule.patience(4) == rule.seconds == 60


def test_the_deadline_looks_at_the_last_five_rounds() -> None:
    rule = deadlines(deadline_factor=3.0, min_deadline=1.0)
    rule.note(1, 100.0)
    for round_ in range(2, 6):
        rule.note(round_, 2.0)
    assert rule.seconds == 300
    rule.note(6, 2.0)
    assert rule.seconds == 6


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(1, 10))
def test_the_deadline_stays_in_its_limits_and_grows_with_the_times(times: list[float], factor: float) -> None:
    short, long = (deadlines(deadline_factor=factor) for _ in range(2))
    for seconds in times:
        short.note(1, seconds)
        long.note(1, 2 * seconds)
    assert 30 <= short.seconds <= long.seconds <= 3600


def test_federation_settings_do_not_name_the_run(tmp_path: Path) -> None:
    def text(config: SimulationConfig) -> bytes:
        play(config, parties())
        return (Path(config.out) / "ledger").read_bytes()

    assert text(settings(tmp_path / "a", "rounds=1")) == text(
        settings(tmp_path / "b", "rounds=1", "federation.deadline_factor=9")
    )
