"""The server's optimisers: their formulas, equal bits on all parties, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, federate, flat, toy, train
from torch import Tensor

from ferret_ext.federated import digests, estimate, wire
from ferret_ext.federated.algorithms.base import Algorithm
from ferret_ext.federated.algorithms.fedavg import FedAvg, FedOpt
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.algorithms.server_optimizer import ServerOptimizer
from ferret_ext.federated.config import FerretConfig, LedgerConfig, ServerConfig, build
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.snapshots import Snapshots

OPTIMISERS = {
    "momentum": ServerConfig(momentum=0.9),
    "adam": ServerConfig("adam"),
    "yogi": ServerConfig("yogi"),
    "adagrad": ServerConfig("adagrad", beta1=0.5),
}
KINDS = ("ferret", "ferret-round", "fedavg")
GIVEN = [("model", "m"), ("data", "d"), ("out", "o")]


def algorithm(kind: str, server: ServerConfig, rate: float = 0.05) -> Algorithm[Any]:
    config = FerretConfig(K=40, coordinates="float32", allocation="norm")
    if kind == "fedavg":
        return FedOpt(rate, train, server=server)
    if kind == "ferret":
        return Ferret(config, rate, train, server=server)
    return SharedFerret(config, rate, train, seed=9, server=server)


def federation(kind: str, optim: str, rounds: int = 3, dtype: torch.dtype = torch.float32) -> Federation:
    fed = federate(algorithm(kind, OPTIMISERS[optim]), toy().to(dtype))
    for _ in range(rounds):
        fed.round()
    return fed


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def walk(config: ServerConfig, deltas: Tensor, rate: float, start: Tensor) -> Tensor:
    """The weights after steps along deltas [rounds, n]."""
    param = start.clone()
    optimizer = ServerOptimizer.on(config, [param])
    assert optimizer is not None
    for delta in deltas:
        optimizer.step([param], lambda tensors, delta=delta: tensors[0].add_(delta), rate)  # type: ignore[misc]
    return param


@pytest.fixture
def deltas() -> Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---- formulas ----


def test_momentum_is_that_of_torchs_sgd(deltas: Tensor) -> None:
    param = torch.ones(50, dtype=torch.float64)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    for delta in deltas:
        param.grad = delta.clone()
        optimizer.step()
    got = walk(ServerConfig(momentum=0.9), deltas, 0.1, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(got, param, rtol=0, atol=1e-14)


def test_adagrad_is_torchs(deltas: Tensor) -> None:
    """With beta1 = 0 and sums that begin at epsilon^2."""
    param = torch.ones(50, dtype=torch.float64)
    optimizer = torch.optim.Adagrad([param], lr=0.1, initial_accumulator_value=0.01, eps=0.1)
    for delta in deltas:
        param.grad = delta.clone()
        optimizer.step()
    got = walk(ServerConfig("adagrad", epsilon=0.1), deltas, 0.1, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(got, param, rtol=0, atol=1e-14)


def test_adam_is_torchs_without_its_corrections(deltas: Tensor) -> None:
    """torch divides m by 1 - beta1^t and v by 1 - beta2^t; each step's rate and epsilon undo it."""
    param = torch.ones(50, dtype=torch.float64)
    optimizer = torch.optim.Adam([param], betas=(0.9, 0.99))
    moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.full_like(param, 0.1**2)}
    optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
    for t, delta in enumerate(deltas, 1):
        param.grad = delta.clone()
        root = math.sqrt(1 - 0.99**t)
        optimizer.param_groups[0].update(lr=0.05 * (1 - 0.9**t) / root, eps=0.1 / root)
        optimizer.step()
    got = walk(ServerConfig("adam", epsilon=0.1), deltas, 0.05, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(got, param, rtol=0, atol=1e-14)


@pytest.mark.parametrize("optim", ["adam", "yogi", "adagrad"])
def test_second_moments_are_the_papers(optim: Any, deltas: Tensor) -> None:
    """Algorithm 2 of arXiv 2003.00295, element by element in Python's floats."""
    config = ServerConfig(optim, beta1=0.8, beta2=0.7, epsilon=0.05)
    expected = []
    for column in deltas.T.tolist():
        x, m, v = 1.0, 0.0, 0.05**2
        for delta in column:
            m = 0.8 * m + 0.2 * delta
            square = delta * delta
            v = {
                "adagrad": v + square,
                "adam": 0.7 * v + 0.3 * square,
                "yogi": v - 0.3 * square * math.copysign(1.0, v - square),
            }[optim]
            x -= 0.01 * m / (math.sqrt(v) + 0.05)
        expected.append(x)
    got = walk(config, deltas, 0.01, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_step_is_single_roundings_in_float32(deltas: Tensor) -> None:
    """The same bits as numpy's, one operation at a time, so that every IEEE machine agrees."""
    rounds = deltas.float()
    config, f = ServerConfig("adam"), np.float32
    x, m, v = np.ones(50, f), np.zeros(50, f), np.full(50, 1e-6, f)
    for delta in rounds.numpy():
        m = m * f(0.9) + delta * f(1 - 0.9)
        v = v * f(0.99) + (delta * delta) * f(1 - 0.99)
        x = x - (m * f(0.02)) / (np.sqrt(v) + f(1e-3))
    assert torch.equal(walk(config, rounds, 0.02, torch.ones(50)), torch.from_numpy(x))


def test_one_steps_momentum_is_the_plain_step() -> None:
    """m = Delta after the first round, whoever averages."""
    for kind in ("ferret", "fedavg"):
        plain = Ferret(FerretConfig(K=40, coordinates="float32", allocation="norm"), 0.05, train)
        simple: Algorithm[Any] = plain if kind == "ferret" else FedAvg(0.05, train)
        with_momentum, without = federation(kind, "momentum", 1), federate(simple)
        without.round()
        got, expected = (flat(fed.server.replica.params) for fed in (with_momentum, without))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


# ---- all parties ----


@pytest.mark.parametrize(("kind", "optim"), list(itertools.product(KINDS, OPTIMISERS)))
def test_server_client_and_late_joiner_hold_the_same_bits(kind: str, optim: str) -> None:
    fed = federation(kind, optim)
    fed.catch_up()
    server = fed.server.replica
    assert same(fed.client.held, server.held)
    assert len(server.held) == 4 * (2 if optim == "momentum" else 3)
    late = fed.algorithm.replicate(toy())
    for broadcast in fed.server.broadcasts_since(0):
        fed.algorithm.rebuild(late, broadcast)
    assert same(late.held, server.held)
    adopted = fed.algorithm.replicate(toy())
    adopted.adopt(server)
    assert same(adopted.held, server.held)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_at_least_float32(kind: str, dtype: torch.dtype) -> None:
    fed = federation(kind, "adam", dtype=dtype)
    fed.catch_up()
    assert same(fed.client.held, fed.server.replica.held)
    assert {tensor.dtype for tensor in fed.server.replica.params} == {dtype}
    wide = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in fed.server.replica.optimizer.moments} == {wide}
    assert (flat(fed.server.replica.params) - flat(toy().parameters())).norm() > 0.01


def test_weighted_and_clipped_updates_step_alike() -> None:
    """FedOpt's mean is by the clients' weights."""
    fed = federate(FedOpt(1.0, train, server=OPTIMISERS["momentum"]))
    plain = federate(FedAvg(1.0, train))
    weights = [1.0, 2.0, 5.0]
    fed.round(weights)
    plain.round(weights)
    got, expected = flat(fed.server.replica.params), flat(plain.server.replica.params)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_parties_with_other_settings_notice(kind: str) -> None:
    """Before any number is exchanged."""
    ours, theirs = algorithm(kind, ServerConfig("adam")), algorithm(kind, ServerConfig("adam", beta2=0.9))
    assert ours.replicate(toy()).digest != theirs.replicate(toy()).digest
    server = Server(ours, toy(), range(3), 1.0, 0)
    with pytest.raises(wire.WireError, match="broadcast must have digest"):
        theirs.rebuild(theirs.replicate(toy()), server.broadcasts_since(0)[0])


def test_moments_that_differ_are_found_in_the_same_round() -> None:
    fed = federation("ferret", "adam", 1)
    fed.catch_up()
    fed.client.optimizer.second[2][0] *= 1.5
    each = digests.of_each(fed.client.held)
    theirs = digests.of_each(fed.server.replica.held)
    told = digests.first_difference(fed.client.names, each, theirs)
    assert told.startswith("second moment of 2.weight is the first of 1 parameters")
    assert digests.together(each) != fed.server.replica.weights


@pytest.mark.parametrize("kind", KINDS)
def test_moments_go_into_snapshots(kind: str, tmp_path: Path) -> None:
    """One with other moments than the run's is not taken."""
    fed = federation(kind, "yogi", 2)
    snapshots = Snapshots(tmp_path, LedgerConfig(snapshot_every=1))
    snapshots.save(fed.server)
    old, new = fed.server, Server(fed.algorithm, toy(), range(3), 1.0, 0)
    (snapshot,) = snapshots.newest(new, limit=9)
    record = wire.Message("x", "record", old.replica.digest, 2, weights=old.replica.weights)
    assert snapshot.fits(record)
    for broadcast in old.broadcasts_since(1):
        new.recall(broadcast)
    new.restore(snapshot.held, snapshot.state, old.replica.weights)
    assert same(new.replica.held, old.replica.held)
    changed = copy.deepcopy(snapshot)
    changed.held[-1][0] += 1
    assert not changed.fits(record)


# ---- what it takes, what is refused ----


def test_memory_disk_and_traffic_know_the_moments() -> None:
    size = sum(param.numel() for param in toy().parameters())
    plain = build([*GIVEN, ("algorithm", "fedavg"), ("rounds", 20)])
    adam = build([*GIVEN, ("algorithm", "fedavg"), ("rounds", 20), ("server.optim", "adam")])
    momentum = build([*GIVEN, ("server.momentum", 0.9)])
    assert [estimate.moments(config, toy()) for config in (plain, momentum, adam)] == [0, 4 * size, 8 * size]
    assert [estimate.relayed(config) for config in (plain, momentum, adam)] == [False, True, True]
    assert estimate.moments(adam, toy().to(torch.bfloat16)) == 8 * size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"server.momentum": 0.5, "server.optim": "adam"}, "server.momentum: expected 0 unless server.optim"),
        ({"server.momentum": 1.0}, "server.momentum: expected a number >= 0 and <= 0.999999, got 1.0"),
        ({"server.beta1": 0.5}, "server.beta1: expected none where server.optim is sgd, got 0.5"),
        ({"server.optim": "lamb"}, "server.optim: expected sgd or adagrad or adam or yogi, got 'lamb'"),
        ({"server.epsilon": 0, "server.optim": "adam"}, "server.epsilon: expected a number >= 1e-15"),
        (
            {"server.optim": "adam", "algorithm": "fedkseed"},
            "server.optim: expected sgd without momentum for fedkseed, whose steps are its own, got .* adam",
        ),
        (
            {"server.momentum": 0.5, "ferret.mode": "reference-code"},
            "server.optim: expected sgd without momentum for ferret.mode=reference-code",
        ),
    ],
)
def test_what_does_not_go_together_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build([*GIVEN, *given.items()])


def test_adagrad_has_no_first_moments_unless_asked() -> None:
    assert ServerConfig("adagrad").chosen_beta1 == 0
    assert ServerConfig("adam").chosen_beta1 == 0.9
    assert ServerConfig("adagrad", beta1=0.5).chosen_beta1 == 0.5
