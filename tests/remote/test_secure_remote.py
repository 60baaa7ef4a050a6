"""Masked updates of clients elsewhere: the weights of one process, and processes that die in a round."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from parties import DirectLink, Party, in_process, lost, play, settings, weights, worker

from ferret_ext.federated import wire
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.worker.calls import Frame

QUICK = [
    *("federation.min_deadline=0.1", "federation.max_deadline=2", "federation.deadline_factor=1"),
    "federation.join_timeout=0.1",
]


def parties(count: int = 3) -> DirectLink:
    return DirectLink({100 + client: Party(worker(client)) for client in range(count)})


SECURE = ("ferret.seeds=shared-round", "ferret.secure_aggregation=true", "client_fraction=1")


@pytest.fixture(scope="module")
def masked_alone(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights of a masked run in one process."""
    return weights(play(settings(tmp_path_factory.mktemp("masked"), *SECURE), parties(), in_process)[0])


def test_a_masked_run_has_the_weights_of_one_in_process(tmp_path: Path, masked_alone: torch.Tensor) -> None:
    """And its broadcasts; the updates are other bytes each time."""
    link = parties()
    result, diary = play(settings(tmp_path, *SECURE), link)
    assert torch.equal(weights(result), masked_alone)
    assert diary.left_out == []
    for party in link.parties.values():
        assert [call["kind"] for call in party.calls] == ["hello", *["ask", "train", "ask"] * 3]


@pytest.mark.parametrize("stage", ["keys", "update", "pairs", "shares"])
def test_a_worker_that_is_started_again_in_a_masked_round_gives_nothing_away(
    tmp_path: Path, stage: str
) -> None:
    """It has no keys of the session that goes on, so that the round goes on without it, or without its share;
    the next one has it again. Where seeds of pairs are asked for, another client has fallen silent."""
    link = parties(5)
    answers: list[Frame] = []

    def start_again(call: Frame) -> Frame | None:
        if call.get("round") != 2 or stage_of(call) != stage:
            return None
        party.worker, party.before = worker(3), lambda call: None
        answers.append(party.worker.answer(call))
        return answers[0]

    party = link.parties[103]
    party.before = start_again
    silent = link.parties[100]
    if stage == "pairs":
        silent.before = lambda call: (
            lost(call) if (call.get("round"), stage_of(call)) == (2, "update") else None
        )
    more = [*QUICK, "rounds=2"] if stage == "pairs" else []
    _, diary = play(settings(tmp_path, *SECURE, *more, "num_clients=5"), link)
    if stage == "keys":
        assert diary.left_out == []
        return
    if stage == "update":
        assert answers[0]["kind"] == "behind"
    else:
        assert answers[0]["failure"].startswith("expected a request of the newest session")
        assert answers[0]["payload"] == b""
    left_out = {"update": [3], "pairs": [0, 3], "shares": []}[stage]
    assert sorted(client for round_, client, _ in diary.left_out) == left_out
    assert all(round_ == 2 for round_, *_ in diary.left_out)


def stage_of(call: Frame) -> str | None:
    if call["kind"] != "ask":
        return "update" if call["kind"] == "train" else None
    return wire.decode(call["request"]).value("stage", str)


def test_a_server_that_died_in_a_masked_round_goes_on_with_the_same_workers(
    tmp_path: Path, masked_alone: torch.Tensor
) -> None:
    """It dies when the sum is known and not yet written down; the sum of the same clients is given again."""
    link, config = parties(), settings(tmp_path, *SECURE)

    def die(call: Frame) -> Frame | None:
        if call.get("round") == 2 and stage_of(call) == "shares":
            party.worker.answer(call)
            raise KeyboardInterrupt
        return None

    party = link.parties[102]
    party.before = die
    with pytest.raises(KeyboardInterrupt):
        play(config, link)
    party.before = lambda call: None
    result, _ = play(config, link)
    assert torch.equal(weights(result), masked_alone)


def test_a_masked_round_of_other_clients_is_not_summed_a_second_time(tmp_path: Path) -> None:
    """The server dies as above, and client 2 does not come back: the difference would be its update."""
    link = parties()
    config = settings(tmp_path, *SECURE, *QUICK)
    party = link.parties[102]

    def die(call: Frame) -> Frame | None:
        if call.get("round") == 2 and stage_of(call) == "shares":
            raise KeyboardInterrupt
        return None

    party.before = die
    with pytest.raises(KeyboardInterrupt):
        play(config, link)
    del link.parties[102]
    with pytest.raises(QuorumError, match=r"one sum in round 2, which was that of clients \[0, 1, 2\], got"):
        play(config, link)


def test_a_party_can_insist_on_masks(tmp_path: Path) -> None:
    """It takes no part in a run whose server would see its updates, and it does in one that masks them."""
    insisting = worker(0, "ferret.secure_aggregation=true")
    for name, more in (("own", []), ("shared", ["ferret.seeds=shared-round"])):
        link = parties()
        link.parties[100] = Party(insisting)
        config = settings(tmp_path / name, "client_fraction=1", "rounds=1", *more)
        _, diary = play(config, link)
        ((_, client, reason),) = diary.left_out
        assert client == 0
        assert re.search("seeds: expected shared-round|broadcast must have algorithm ferret-secure", reason)
    link = parties()
    link.parties[100] = Party(insisting)
    _, diary = play(settings(tmp_path / "masked", *SECURE, "rounds=1"), link)
    assert diary.left_out == []


def test_a_client_that_never_answers_costs_a_masked_round_nothing(tmp_path: Path) -> None:
    link = parties()
    link.parties[101].before = lambda call: lost(call) if call["kind"] != "hello" else None
    _, diary = play(settings(tmp_path, *SECURE, *QUICK), link)
    assert [(round_, client) for round_, client, _ in diary.left_out] == [(1, 1), (2, 1), (3, 1)]
    assert all(call["kind"] != "train" for call in link.parties[101].calls)
