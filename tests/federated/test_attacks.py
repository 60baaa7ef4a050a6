"""Three of ten clients attack a small regression: what each rule promises, and what becomes of the mean."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from attacks import ATTACKS, NONE, Task, run, spoil
from federation import flat
from torch import nn

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Algorithm
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.config import FerretConfig

CLIENTS, ATTACKERS, ROUNDS = 10, 3, 10


def teacher() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(12, 4)


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(12, 4)


def train(model: Any, _: Any, seed: int, client: int = 0) -> float:
    """Two steps of SGD on rows of the client's own."""
    inputs = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed % 2**63))
    with torch.no_grad():
        targets = teacher()(inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def error(model: Any) -> float:
    """The square distance of the weights from the teacher's, as a multiple of that at the start."""

    def square(a: nn.Module, b: nn.Module) -> float:
        return (flat(a.parameters()) - flat(b.parameters())).square().sum().item()

    return square(model, teacher()) / square(student(), teacher())


def make(variant: str) -> Algorithm[Any]:
    config = FerretConfig(K=26, coordinates="float32", server_warmup=0)
    if variant == "ferret":
        return Ferret(config, 0.3, train)
    return FedAvg(1.0, train) if variant == "fedavg" else SharedFerret(config, 0.3, train, seed=3)


@cache
def task() -> Task:
    return Task(make, student(), [[]] * CLIENTS, error)


@cache
def error_after(variant: str, rule: str, attack: str) -> float:
    return run(task(), variant, rule, attack, ATTACKERS if attack != NONE else 0, ROUNDS)[0]


REJECT = "mean, 5 x norm rejected"
# The error over the mean's without an attack: at most this by the rule, at least this by the mean.
CLAIMS = [
    ("fedavg", "median", "sign flip", 5, 10),
    ("fedavg", "trimmed-mean", "sign flip", 5, 10),
    ("fedavg", "median", "x -10", 5, 10_000),
    ("fedavg", "trimmed-mean", "x -10", 5, 10_000),
    ("fedavg", REJECT, "x -10", 1.2, 10_000),
    ("fedavg", "norm-clip", "x 1000", 1.5, 1e9),
    ("fedavg", "median", "x 1000", 1.5, 1e9),
    ("fedavg", "median", "random", 3, 3.5),
    ("fedavg", "trimmed-mean", "random", 3, 3.5),
    ("ferret-shared-round", "median", "sign flip", 1.5, 1.7),
    ("ferret-shared-round", "trimmed-mean", "sign flip", 1.5, 1.7),
    ("ferret-shared-round", "median", "x -10", 1.5, 20),
    ("ferret-shared-round", "median", "random", 1.3, 1.33),
    ("ferret-shared-round", REJECT, "x -10", 1.2, 20),
    ("ferret-shared-round", "norm-clip", "x 1000", 1.2, 1e9),
    ("ferret", REJECT, "x -10", 1.2, 20),
    ("ferret", "norm-clip", "x -10", 2.5, 20),
    ("ferret", "norm-clip", "x 1000", 1.2, 1e9),
]


@pytest.mark.parametrize(("variant", "rule", "attack", "most", "least"), CLAIMS)
def test_a_rule_withstands_an_attack_that_the_mean_does_not(
    variant: str, rule: str, attack: str, most: float, least: float
) -> None:
    calm = error_after(variant, "mean", NONE)
    assert calm < 0.4
    assert error_after(variant, rule, attack) <= most * calm
    assert error_after(variant, "mean", attack) >= least * calm


@pytest.mark.parametrize("variant", ["fedavg", "ferret", "ferret-shared-round"])
def test_clipping_does_not_help_against_a_turned_sign(variant: str) -> None:
    """It bounds how far an update reaches, not where to."""
    assert error_after(variant, "norm-clip", "sign flip") >= error_after(variant, "mean", "sign flip")


def test_attacks_change_the_numbers_and_nothing_else() -> None:
    update = np.linspace(-1, 2, 400, dtype=np.float32)
    values = {"gammas": update, "seed": 7, "counts": np.arange(3, dtype=np.uint32)}
    message = wire.Message("ferret", "update", b"12345678", 4, 2, 3.0, values, b"the run.")
    spoiled = {
        attack: [wire.decode(spoil(wire.encode(message), attack, seed)) for seed in (0, 1)]
        for attack in ATTACKS
    }
    for twice in spoiled.values():
        for it in twice:
            assert (it.round, it.client, it.weight, it.run, it.values["seed"]) == (4, 2, 3.0, b"the run.", 7)
            assert np.array_equal(it.values["counts"], values["counts"])
    gammas = {attack: [it.values["gammas"] for it in twice] for attack, twice in spoiled.items()}
    assert np.array_equal(gammas["sign flip"][0], -update)
    np.testing.assert_allclose(gammas["x -10"][0], -10 * update, rtol=1e-6)
    np.testing.assert_allclose(gammas["x 1000"][1], 1000 * update, rtol=1e-6)
    first, second = gammas["random"]
    norm = np.linalg.norm(update)
    assert np.linalg.norm(first) == pytest.approx(norm, rel=1e-5) == np.linalg.norm(second)
    assert abs(first @ second) < 0.25 * norm**2
    assert abs(first @ update) < 0.25 * norm**2
