"""What the noise of `privacy` comes to: epsilon at delta after each round, by dp-accounting's privacy loss
distributions (Koskela et al. 2020, Doroshenko et al. 2022), which give upper bounds that are tight.

A release is (sum + N(0, (z C)^2)) with a sum that one client changes by at most C:

    central, distributed    neighbours: the same run without the data of one client, which then adds nothing
    local                   neighbours: any other data of the client, 2 C apart, so that z counts half

    public      who is drawn is known, and a client spends nothing in rounds without it: told is the epsilon
                of the client that was drawn most often
    secret      each client is drawn by a coin of probability client_fraction in every round, and spends what
                the Poisson-subsampled Gaussian mechanism does
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.draws import Draws
from ferret_ext.federated.privacy import multiplier
from ferret_ext.federated.settings import ConfigError

FINEST = 1e-4  # interval of losses
INTERVALS = 2**-17  # of the range of losses, where these are large
LARGEST = 2.0**10  # noise_multiplier that a target may take
FEWEST = 20  # clients of a round on average; none come with probability e^-20
DIGITS = 1000  # noise multipliers are found in steps of 1 / DIGITS


class Spent(NamedTuple):
    """What a run has spent, by the client that has spent most."""

    epsilon: float
    delta: float


def epsilon(noise_multiplier: float, releases: int, delta: float, probability: float = 1.0) -> float:
    """Of so many Gaussian mechanisms of sensitivity 1 one after the other, each on a Poisson sample."""
    if releases == 0:
        return 0.0
    if probability == 1.0:  # one mechanism with less noise, exactly
        return _told(_loss(noise_multiplier / math.sqrt(releases), 1.0).get_epsilon_for_delta(delta))
    return _told(_loss(noise_multiplier, probability).self_compose(releases).get_epsilon_for_delta(delta))


@dataclass(frozen=True)
class Accountant:
    """config: of a run whose noise is resolved, and that says how many clients it has."""

    config: SimulationConfig

    def spent(self, rounds: int) -> Spent:
        """After so many rounds."""
        privacy = self.config.privacy
        each = multiplier(privacy) / (2 if privacy.noise == "local" else 1)
        told = epsilon(each, self._releases(rounds), privacy.delta, self._probability)
        return Spent(told, privacy.delta)

    def affordable(self) -> int:
        """How many of the run's rounds the target allows. Raises ConfigError where it is not even one."""
        target, rounds = self.config.privacy.target_epsilon, self.config.rounds
        if target is None or self.within_target:
            return rounds
        least, most = 0, rounds  # affordable and not
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self.spent(middle).epsilon <= target else (least, middle)
        if least == 0:
            raise ConfigError(
                f"privacy.target_epsilon: expected at least {self.spent(1).epsilon:.4g}, which a round with "
                f"privacy.noise_multiplier {multiplier(self.config.privacy):g} spends, got {target:g}"
            )
        return least

    def notes(self, rounds: int) -> list[str]:
        """Lines for the log on what is promised in so many rounds, and what spoils it."""
        config, privacy = self.config, self.config.privacy
        told = self.spent(rounds)
        lines = [
            f"privacy: {privacy.noise} noise of {multiplier(privacy):g} times norm {privacy.clip_norm:g}; "
            f"epsilon {told.epsilon:.3f} at delta {told.delta:g} after {rounds:,} rounds"
        ]
        if privacy.target_epsilon is not None and rounds < config.rounds:
            lines.append(
                f"privacy: the run ends after round {rounds:,} of {config.rounds:,}, with "
                f"privacy.target_epsilon {privacy.target_epsilon:g} spent"
            )
        if privacy.delta * _clients(config) >= 1:
            lines.append(
                f"privacy: delta {privacy.delta:g} is no less than one over {_clients(config):,} clients, "
                "which allows for giving away one client's records whole; lower privacy.delta"
            )
        if privacy.sampling == "secret":
            lines.append("privacy: metrics.jsonl and draws.key tell who was drawn; keep them to yourself")
        if privacy.noise_seed is not None:
            lines.append("privacy: none, since privacy.noise_seed lets everybody take the noise off again")
        return lines

    @property
    def within_target(self) -> bool:
        """Whether all rounds spend no more than the target."""
        target = self.config.privacy.target_epsilon
        return target is None or self.spent(self.config.rounds).epsilon <= target

    @property
    def _probability(self) -> float:
        return self.config.client_fraction if self.config.privacy.sampling == "secret" else 1.0

    def _releases(self, rounds: int) -> int:
        """In which the client that has spent most can have taken part."""
        config = self.config
        if config.privacy.sampling == "secret" or config.client_fraction == 1 or rounds == 0:
            return rounds
        draws = Draws(
            range(_clients(config)), config.client_fraction, config.seed, config.federation.over_selection
        )
        times: Counter[int] = Counter()
        for round_ in range(1, rounds + 1):
            times.update(draws.of_round(round_))
        return max(times.values())


def of(config: SimulationConfig, clients: int) -> Accountant | None:
    """The accountant of a run of so many clients, if privacy is promised. Raises ConfigError."""
    if config.privacy.noise == "none":
        return None
    if config.num_clients != clients:
        raise ConfigError(
            f"num_clients: expected {clients:,}, as many as there are, got {config.num_clients}"
        )
    return Accountant(config)


def resolve(config: SimulationConfig) -> SimulationConfig:
    """The config with the least noise that its target allows, where it says none. Raises ConfigError."""
    privacy = config.privacy
    if privacy.noise == "none":
        return config
    drawn = config.client_fraction * _clients(config)
    if privacy.sampling == "secret" and drawn < FEWEST:
        raise ConfigError(
            f"client_fraction: expected at least {FEWEST} clients a round where privacy.sampling is secret, "
            f"since a round may draw none, got {drawn:g}"
        )
    _check_installed()
    if privacy.noise_multiplier is not None:
        return config

    def with_noise(steps: int) -> SimulationConfig:
        return replace(config, privacy=replace(privacy, noise_multiplier=steps / DIGITS))

    assert privacy.target_epsilon is not None, "config lets no other through"
    least, most = 300, int(LARGEST * DIGITS)  # too little and enough
    if not Accountant(with_noise(most)).within_target:
        raise ConfigError(
            f"privacy.target_epsilon: expected one that a noise_multiplier of {LARGEST:g} reaches in "
            f"{config.rounds} rounds at delta {privacy.delta:g}, got {privacy.target_epsilon:g}"
        )
    while most - least > 1:
        middle = round(math.sqrt(least * most)) if most > 2 * least else (least + most) // 2
        enough = Accountant(with_noise(middle)).within_target
        least, most = (least, middle) if enough else (middle, most)
    return with_noise(most)


@lru_cache(maxsize=64)
def _loss(noise_multiplier: float, probability: float) -> Any:
    """The privacy loss of one release."""
    from dp_accounting.pld import privacy_loss_distribution as losses

    spread = 0.5 / noise_multiplier**2 + 12 / noise_multiplier
    return losses.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=max(FINEST, INTERVALS * spread),
        sampling_prob=probability,
    )


def _told(value: float) -> float:
    """Raises ConfigError for an epsilon that says nothing."""
    if not math.isfinite(value):
        raise ConfigError("privacy.delta: expected one at which an epsilon can be told, got too small a one")
    return float(value)


def _clients(config: SimulationConfig) -> int:
    if config.num_clients is None:
        raise ConfigError(
            f"num_clients: expected a number where privacy.noise is {config.privacy.noise}, got none"
        )
    return config.num_clients


def _check_installed() -> None:
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(
            "privacy.noise: expected none unless dp-accounting is there; in the source tree, pip install "
            "'.[privacy]'"
        ) from None
