"""Runs whose updates are masked: the bits of the plain integer run, whatever drops out on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import flat, toy, train
from hypothesis import given
from hypothesis import strategies as st
from tampering import Listener
from torch import nn
from toy import examples

from ferret_ext import BlockPlan
from ferret_ext.federated import estimate, ledger, models, wire
from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.algorithms.ferret import SharedFerret
from ferret_ext.federated.client import DivergedError, LocalFailure
from ferret_ext.federated.config import FerretConfig, LedgerConfig, RobustConfig, SimulationConfig, build
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.evaluation import Evaluation
from ferret_ext.federated.journal import FolderJournal, Genesis
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.rounds import run_rounds
from ferret_ext.federated.secure import integers, masks
from ferret_ext.federated.secure.ferret import SecureFerret
from ferret_ext.federated.secure.participant import Participant
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError

RUN = b"the run."
GENESIS = Genesis(bytes(32), "{}")


def secure(**settings: Any) -> SecureFerret:
    given = {"K": 200, "seeds": "shared-round", "secure_aggregation": True, **settings}
    return SecureFerret(FerretConfig(**given), 0.4, train, seed=9)


class Carrier:
    """Clients in this process. silent: (round, stage, client) that do not answer; `update` is a stage."""

    def __init__(self, algorithm: Any, clients: int, silent: set[tuple[int, str, int]] = frozenset()) -> None:  # type: ignore[assignment]
        self.members = InProcessClients(algorithm, toy(), [examples(1)] * clients, [1.0] * clients, seed=0)
        self.silent, self.listener = silent, Listener()

    def exchange(self, round_: int, chosen: list[int], server: Server[Any]) -> list[Reply]:
        replies = self.members.exchange(self.listener, round_, chosen, server)
        return [self._heard(round_, "update", reply) for reply in replies]

    def ask(self, round_: int, requests: Mapping[int, bytes], enough: int, least: int) -> list[Reply]:
        stage = wire.decode(next(iter(requests.values()))).value("stage", str)
        return [self._heard(round_, stage, it) for it in self.members.ask(round_, requests, enough, least)]

    def _heard(self, round_: int, stage: str, reply: Reply) -> Reply:
        if (round_, stage, reply.client) not in self.silent:
            return reply
        return Reply(reply.client, b"", 0, math.nan, reply.watch, "no reply")


def evaluate(round_: int, model: Any, watch: Any) -> Evaluation:
    return Evaluation(1.0, 1, {}, [])


def play(
    algorithm: Any, *silent: tuple[int, str, int], clients: int = 5, rounds: int = 3, **robust: Any
) -> tuple[Server[Any], list[RoundMetrics]]:
    carrier = Carrier(algorithm, clients, set(silent))
    server = Server(
        algorithm, toy(), range(clients), 1.0, 0, run=RUN, robust=RobustConfig(**robust), equal_weights=True
    )
    history = run_rounds(rounds, server, carrier.exchange, evaluate, carrier.listener, 1, ask=carrier.ask)
    return server, history


@contextmanager
def without_masks() -> Iterator[None]:
    """Masks of zeros: what clients send is their integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "stream", lambda seed, count: np.zeros(count, np.uint32))
        yield


@contextmanager
def spied() -> Iterator[dict[int, list[np.ndarray]]]:  # type: ignore[type-arg]
    """The integers that each client masks, round by round."""
    seen: dict[int, list[Any]] = {}
    original = Participant.hide

    def hide(self: Participant, whole: Any) -> Any:
        seen.setdefault(self.client, []).append(whole.copy())
        return original(self, whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Participant, "hide", hide)
        yield seen


# ---- the bits ----


@pytest.mark.parametrize("allocation", ["size", "curvature"])
def test_a_masked_run_has_the_weights_of_the_plain_integer_run(allocation: str) -> None:
    """With clients that drop out at every stage; broadcasts are the same bytes, and updates are not."""
    silent = [(1, "keys", 3), (2, "update", 1), (2, "pairs", 4), (3, "shares", 0)]
    masked, history = play(secure(allocation=allocation), *silent)
    with without_masks():
        plain, _ = play(secure(allocation=allocation), *silent)
    assert masked.broadcasts == plain.broadcasts
    assert torch.equal(flat(masked.replica.params), flat(plain.replica.params))
    assert (flat(masked.replica.params) - flat(toy().parameters())).norm() > 0.01
    assert [metrics.left_out for metrics in history[1:]] == [[3], [1, 4], []]


def test_the_mean_that_is_relayed_is_that_of_the_clients_integers() -> None:
    with spied() as seen:
        server, _ = play(secure(), rounds=2)
    for round_ in (1, 2):
        before, after = (wire.decode(it) for it in server.broadcasts[round_ - 1 : round_ + 1])
        plan = replayed(server, round_ - 1).plan
        unit = integers.units(plan, before.array("reaches", "<i2", (len(plan.blocks),)), integers.bits_of(5))
        exact = [sum(int(seen[client][round_ - 1][k]) for client in range(5)) for k in range(plan.K)]
        expected = [np.float32(total * one / 5) for total, one in zip(exact, unit.tolist(), strict=True)]
        assert after.array("gammas", "<f4", (plan.K,)).tolist() == expected


def replayed(server: Server[Any], round_: int) -> Any:
    """A replica after a round, from the broadcasts alone."""
    replica = server.algorithm.replicate(toy())
    for broadcast in server.broadcasts[: round_ + 1]:
        server.algorithm.rebuild(replica, broadcast)
    return replica


def test_integers_lose_next_to_nothing() -> None:
    """Beside floats on the same bases; a step of the integers is some 2^-10 of a coordinate or less."""
    config = FerretConfig(K=200, seeds="shared-round", coordinates="float32")
    start = flat(toy().parameters())
    floats, _ = play(SharedFerret(config, 0.4, train, seed=9))
    masked, _ = play(secure())
    moved, other = (flat(server.replica.params) - start for server in (floats, masked))
    assert (moved - other).norm() < 1e-4 * moved.norm()


def test_a_late_joiner_and_a_resumed_run_get_to_the_same_bits(tmp_path: Path) -> None:
    """From the broadcasts, and from the ledger with its snapshots; the public range comes along."""
    through, _ = play(secure(), rounds=4)
    late = replayed(through, 4)
    assert torch.equal(flat(late.params), flat(through.replica.params))
    for rounds, measured in ((3, None), (4, True)):
        algorithm, carrier = secure(), Carrier(secure(), 5)
        server = Server(algorithm, toy(), range(5), 1.0, 0, run=GENESIS.run, equal_weights=True)
        history = [round_metrics(n) for n in range(4)] if measured else None
        journal = FolderJournal(tmp_path, GENESIS, LedgerConfig(snapshot_every=2), {}, history)
        run_rounds(rounds, server, carrier.exchange, evaluate, carrier.listener, 1, journal, carrier.ask)
    assert server.replica.round == 4
    assert torch.equal(flat(server.replica.params), flat(through.replica.params))
    assert server.replica.reaches.tolist() == through.replica.reaches.tolist()
    assert len(list(ledger.read(tmp_path / "ledger"))) == 5


def round_metrics(round_: int) -> RoundMetrics:
    return RoundMetrics(
        round=round_,
        clients=[],
        left_out=[],
        rejected=[],
        eval_loss=1.0,
        train_loss=None,
        payload_bytes_up=0,
        payload_bytes_down=0,
        model_bytes=1,
        seconds_local=0,
        seconds_project=0,
        seconds_rebuild=0,
        seconds_server=0,
        seconds_eval=0,
    )


def test_too_few_that_stay_stop_the_run_with_their_reasons() -> None:
    silent = [(2, "update", client) for client in (0, 1, 4)]
    with pytest.raises(QuorumError, match="round 2: expected updates of at least 3 clients, got 2"):
        play(secure(), *silent)
    silent = [(1, "pairs", 1), (1, "update", 0)]
    with pytest.raises(QuorumError, match="round 1: expected updates of at least 4 clients, got 3"):
        play(secure(), *silent, quorum=4)


def test_the_threshold_can_be_raised() -> None:
    with pytest.raises(QuorumError, match="round 1: expected updates of at least 5 clients, got 4"):
        play(secure(secure_threshold=1.0), (1, "update", 0))


@pytest.mark.parametrize("clients", [2, 5])
def test_bytes_of_all_exchanges_are_counted_and_estimated(clients: int) -> None:
    config = build(
        [
            *(("model", models.TINY_LLAMA), ("data", "d"), ("out", "o"), ("num_clients", clients)),
            *(("ferret.seeds", "shared-round"), ("ferret.secure_aggregation", True), ("ferret.K", 200)),
        ]
    )
    server, history = play(secure(), clients=clients, rounds=2)
    told = estimate.traffic(config, toy())
    opening = len(server.broadcasts[0])
    assert history[2].payload_bytes_up == pytest.approx(told.up(1), rel=0.01)
    assert history[1].payload_bytes_down == pytest.approx(clients * (opening + told.requests), rel=0.01)
    assert sum(it.payload_bytes_down for it in history) == pytest.approx(
        told.down(2) + clients * opening, rel=0.01
    )


# ---- the public range ----


def plan_of(*sizes: int, K: int = 60) -> BlockPlan:
    named = [(f"p{i}", nn.Parameter(torch.zeros(size))) for i, size in enumerate(sizes)]
    return BlockPlan.from_parameters(named, K)


@given(st.integers(1, 10**5))
def test_sums_of_any_number_of_clients_fit(clients: int) -> None:
    bits = integers.bits_of(clients)
    assert clients << bits <= 2**30 < clients << (bits + 1)


@given(st.integers(-40, 40), st.integers(2, 300), st.floats(-1, 1), st.integers(0, 59))
def test_coordinates_are_rounded_to_the_nearest_unit_and_never_cut_off(
    reach: int, clients: int, share: float, place: int
) -> None:
    plan, bits = plan_of(1000, 30), integers.bits_of(clients)
    reaches = np.array([reach, reach + 1], np.int16)
    unit = integers.units(plan, reaches, bits)
    gammas = np.zeros(60, np.float32)
    gammas[place] = np.float32(share * unit[place] * 2.0**bits)
    whole = integers.to_integers(plan, reaches, gammas, bits)
    assert abs(whole[place] * unit[place] - float(gammas[place])) <= unit[place] / 2
    most = np.float32(unit[place] * 2.0**bits)
    gammas[place] = -most
    assert integers.to_integers(plan, reaches, gammas, bits)[place] == -(2**bits)
    for beyond in (np.nextafter(most, np.float32(math.inf)), np.float32(math.nan), np.float32(-math.inf)):
        gammas[place] = beyond
        with pytest.raises(LocalFailure, match=r"coordinates must lie within .*, and not all do"):
            integers.to_integers(plan, reaches, gammas, bits)


def test_a_client_that_does_not_fit_is_left_out_and_says_so() -> None:
    """Its training takes it 10,000 times as far as the others': nothing of it is in the sum."""

    def far(model: Any, data: Any, seed: int, client: int = 0) -> float:
        loss = train(model, data, seed, client)
        if client == 2:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1e4)
        return loss

    algorithm = SecureFerret(secure().config, 0.4, far, seed=9)
    carrier = Carrier(algorithm, 5)
    heard = []
    carrier.listener.client_left_out = lambda *told: heard.append(told)  # type: ignore[method-assign]
    server = Server(algorithm, toy(), range(5), 1.0, 0, run=RUN, equal_weights=True)
    history = run_rounds(2, server, carrier.exchange, evaluate, carrier.listener, 1, ask=carrier.ask)
    without, _ = play(secure(), (1, "update", 2), (2, "update", 2), rounds=2)
    assert torch.equal(flat(server.replica.params), flat(without.replica.params))
    assert [metrics.left_out for metrics in history[1:]] == [[2], [2]]
    assert all("coordinates must lie within the round's public range" in reason for *_, reason in heard)
    assert not any(re.search(r"\d{2}|\d\.", reason) for *_, reason in heard)  # a number would tell something


def test_where_nobody_fits_the_run_stops() -> None:
    with pytest.raises(DivergedError, match=r"every client in round 1: coordinates must lie within"):
        play(secure(secure_range=1e-6))


def test_the_range_follows_the_last_mean() -> None:
    """1024 times each block's root mean square, over d / K; a still block gets a 128th of the largest."""
    plan, K = plan_of(3000, 40, 40), 60
    first, second, third = (block.k for block in plan.blocks)
    mean = np.zeros(K, np.float32)
    mean[:first] = 3.0 * 3000 / first
    mean[first : first + second] = 0.5 * 40 / second
    got = integers.next_reaches(plan, np.zeros(3, np.int16), mean).tolist()
    assert got == [math.ceil(math.log2(1024 * size)) for size in (3.0, 0.5, 3.0 / 128)]
    assert integers.next_reaches(plan, np.array([5, 6, 7], np.int16), 0 * mean).tolist() == [5, 6, 7]
    assert third > 0


@pytest.mark.parametrize("reaches", [[0, 0, 0], [0, 0, 0, 901], [-901, 0, 0, 0]])
def test_a_broadcast_out_of_bounds_is_refused(reaches: list[int]) -> None:
    algorithm = secure()
    opening = wire.decode(algorithm.open(algorithm.replicate(toy())))
    changed = {**opening.values, "reaches": np.array(reaches, np.int16)}
    replica = algorithm.replicate(toy())
    with pytest.raises(wire.WireError, match="broadcast must have reaches"):
        algorithm.rebuild(replica, wire.encode(wire.Message(**{**vars(opening), "values": changed})))


# ---- settings ----


def config(**more: Any) -> SimulationConfig:
    given = {"model": "m", "data": "d", "out": "o", "ferret.secure_aggregation": True}
    return build({**given, "ferret.seeds": "shared-round", **more}.items())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ferret.seeds", "per-client", "ferret.seeds: expected shared-round where ferret.secure_aggregation"),
        ("ferret.coordinates", "int8", "ferret.coordinates: expected auto .* updates are masked integers"),
        ("robust.rule", "median", "robust.rule: expected mean .* the sum alone cannot screen"),
        ("robust.rule", "trimmed-mean", "robust.rule: expected mean"),
        ("robust.rule", "norm-clip", "robust.rule: expected mean"),
        ("robust.max_norm_ratio", 5, r"robust.max_norm_ratio: expected 1000.0 .* knows no norms, got 5"),
        ("client_weights", "examples", "client_weights: expected uniform .* keeps to its weight"),
    ],
)
def test_what_needs_single_updates_is_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**{key: value})


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "find_spec", lambda name: None if name == "Crypto" else name)
    with pytest.raises(
        ConfigError, match=r"expected pycryptodome to be installed, got none; .*'.\[secure\]'"
    ):
        secure()


def test_a_client_that_is_not_invited_trains_nothing() -> None:
    algorithm = secure()
    members = InProcessClients(algorithm, toy(), [examples(1)] * 3, [1.0] * 3, seed=0)
    server = Server(algorithm, toy(), range(3), 1.0, 0, run=RUN)
    (reply, *_) = members.exchange(Listener(), 1, [0, 1, 2], server)
    assert reply.failure == "expected an invitation, since ferret.secure_aggregation is set, got none"
