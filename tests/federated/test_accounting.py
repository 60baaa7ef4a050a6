"""Epsilon, against formulas and integrals of our own."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ferret_ext.federated import accounting
from ferret_ext.federated.accounting import Accountant, epsilon
from ferret_ext.federated.config import PrivacyConfig, SimulationConfig
from ferret_ext.federated.draws import Draws, SecretDraws
from ferret_ext.federated.settings import ConfigError

pytest.importorskip("dp_accounting", reason="epsilon needs dp-accounting")


def below(x: float) -> float:
    """The standard normal distribution function."""
    return math.erfc(-x / math.sqrt(2)) / 2


def analytic_delta(mu: float, epsilon: float) -> float:
    """Of Gaussian mechanisms, mu^2 the sum of (sensitivity / std)^2 (Balle and Wang 2018, theorem 8)."""
    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


def smallest(delta_of: Any, delta: float) -> float:
    """The epsilon at which a falling function is delta, by bisection."""
    least, most = 0.0, 200.0
    for _ in range(80):
        middle = (least + most) / 2
        least, most = (middle, most) if delta_of(middle) > delta else (least, middle)
    return most


@pytest.mark.parametrize(
    ("z", "rounds", "delta"), [(1.0, 1, 1e-5), (0.5, 1, 1e-3), (2.0, 9, 1e-6), (4, 100, 1e-5), (0.3, 4, 1e-5)]
)
def test_without_sampling_it_is_the_analytic_gaussian(z: float, rounds: int, delta: float) -> None:
    expected = smallest(lambda e: analytic_delta(math.sqrt(rounds) / z, e), delta)
    assert expected * (1 - 1e-6) <= epsilon(z, rounds, delta) <= expected * (1 + 1e-3)


@pytest.mark.parametrize(("z", "q", "delta"), [(1.0, 0.1, 1e-5), (0.6, 0.5, 1e-4), (2.0, 0.01, 1e-6)])
def test_one_sampled_round_is_the_hockey_stick_integral(z: float, q: float, delta: float) -> None:
    """max over both orders of the integral of (p - e^epsilon q)+, by the trapezoidal rule."""
    x = np.linspace(-12 * z, 12 * z + 1, 400_001)
    without = np.exp(-(x**2) / (2 * z**2)) / (z * math.sqrt(2 * math.pi))
    with_one = (1 - q) * without + q * np.exp(-((x - 1) ** 2) / (2 * z**2)) / (z * math.sqrt(2 * math.pi))

    def delta_of(e: float) -> float:
        orders = ((with_one, without), (without, with_one))
        return max(float(np.trapezoid(np.maximum(p - math.exp(e) * r, 0), x)) for p, r in orders)

    expected = smallest(delta_of, delta)
    assert expected - 1e-5 <= epsilon(z, 1, delta, q) <= expected + 2e-3


def test_many_sampled_rounds_are_bounded_by_renyi_divergences() -> None:
    """Of integer order a (Mironov, Talwar and Zhang 2019), over a - 1: log sum_k C(a, k) (1 - q)^(a - k) q^k
    e^((k^2 - k) / 2 z^2)."""
    z, q, rounds, delta = 1.2, 0.05, 50, 1e-5

    def divergence(a: int) -> float:
        terms = [
            math.log(math.comb(a, k)) + (a - k) * math.log1p(-q) + k * math.log(q) + (k * k - k) / (2 * z * z)
            for k in range(a + 1)
        ]
        return float(np.logaddexp.reduce(terms)) / (a - 1)

    renyi = min(rounds * divergence(a) + math.log(1 / delta) / (a - 1) for a in range(2, 60))
    told = epsilon(z, rounds, delta, q)
    assert epsilon(z, 1, delta, q) < told < renyi
    assert told < epsilon(z, rounds, delta) / 3  # sampling is worth it
    assert told > 0.5 * renyi


def test_it_grows_by_the_round_and_falls_with_noise() -> None:
    grows = [epsilon(1.0, rounds, 1e-5, 0.2) for rounds in range(4)]
    assert grows[0] == 0
    assert sorted(set(grows)) == grows
    assert epsilon(2.0, 3, 1e-5, 0.2) < grows[3]


def config_of(rounds: int = 6, fraction: float = 1.0, **privacy: Any) -> SimulationConfig:
    chosen = {"noise": "central", "noise_multiplier": 2.0, **privacy}
    return SimulationConfig(
        algorithm="fedavg",
        num_clients=50,
        client_fraction=fraction,
        rounds=rounds,
        privacy=PrivacyConfig(**chosen),
    )


def test_public_draws_count_by_the_client_that_was_drawn_most_often() -> None:
    accountant, draws = Accountant(config_of(fraction=0.3)), Draws(range(50), 0.3, 0)
    for rounds in (1, 3, 6):
        times = [sum(client in draws.of_round(r) for r in range(1, rounds + 1)) for client in range(50)]
        assert accountant.spent(rounds) == (epsilon(2.0, max(times), 1e-5), 1e-5)
    assert 1 < max(times) < 6


def test_secret_draws_count_by_their_probability() -> None:
    spent = Accountant(config_of(fraction=0.4, sampling="secret")).spent(6)
    assert spent.epsilon == epsilon(2.0, 6, 1e-5, 0.4) < Accountant(config_of()).spent(6).epsilon


def test_local_updates_are_twice_as_far_apart() -> None:
    assert Accountant(config_of(noise="local")).spent(6).epsilon == epsilon(1.0, 6, 1e-5)


def test_secret_draws_are_independent_coins() -> None:
    """As many as expected, not always as many, and others by another key."""
    draws, other = SecretDraws(range(1000), 0.1, 1), SecretDraws(range(1000), 0.1, 2)
    counts = [len(draws.of_round(round_)) for round_ in range(1, 101)]
    assert abs(np.mean(counts) - 100) < 8 * math.sqrt(90 / 100)
    assert 90 / 3 < np.var(counts) < 90 * 3
    assert draws.expected == 100
    assert draws.of_round(1) == SecretDraws(range(1000), 0.1, 1).of_round(1)
    assert draws.of_round(1) != other.of_round(1)
    both = set(draws.of_round(1)) & set(draws.of_round(2))
    assert len(both) < 40


@pytest.mark.parametrize("sampling", ["public", "secret"])
def test_a_target_gets_the_least_noise_that_it_takes(sampling: str) -> None:
    config = config_of(4, 0.6, noise_multiplier=None, target_epsilon=3.0, sampling=sampling)
    resolved = accounting.resolve(config)
    z = resolved.privacy.noise_multiplier
    assert z is not None
    assert Accountant(resolved).affordable() == 4
    less = replace(resolved, privacy=replace(resolved.privacy, noise_multiplier=z - 0.002))
    assert Accountant(less).affordable() == 3


def test_a_budget_says_how_many_rounds_there_are() -> None:
    accountant = Accountant(config_of(40, target_epsilon=5.0))
    rounds = accountant.affordable()
    assert 1 < rounds < 40
    assert accountant.spent(rounds).epsilon <= 5 < accountant.spent(rounds + 1).epsilon


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(config_of(), num_clients=None),
            "num_clients: expected a number where privacy.noise is central",
        ),
        (config_of(fraction=0.1, sampling="secret"), "client_fraction: expected at least 20 clients a round"),
        (
            config_of(noise_multiplier=None, target_epsilon=1e-5, delta=1e-12),
            "privacy.target_epsilon: expected one that a noise_multiplier of 1024 reaches in 6 rounds",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused(config: SimulationConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accounting.resolve(config)


def test_a_budget_that_no_round_fits_is_refused() -> None:
    accountant = Accountant(config_of(target_epsilon=0.5, noise_multiplier=1.0))
    with pytest.raises(ConfigError, match=r"privacy.target_epsilon: expected at least 4\.377, which a"):
        accountant.affordable()


def test_the_clients_that_there_are_must_be_those_that_were_counted() -> None:
    assert accounting.of(SimulationConfig(), 7) is None
    with pytest.raises(ConfigError, match="num_clients: expected 49, as many as there are, got 50"):
        accounting.of(config_of(), 49)


def test_bad_promises_are_said() -> None:
    accountant = Accountant(config_of(delta=0.1, noise_seed=3))
    said = "\n".join(accountant.notes(4))
    assert said.startswith("privacy: central noise of 2 times norm 1; epsilon ")
    assert "delta 0.1 is no less than one over 50 clients" in said
    assert "privacy: none, since privacy.noise_seed" in said


def test_without_its_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = PrivacyConfig(noise="central", noise_multiplier=1.0)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"in the source tree, pip install '\.\[privacy\]'"):
        accounting.resolve(SimulationConfig(num_clients=3, privacy=privacy))
