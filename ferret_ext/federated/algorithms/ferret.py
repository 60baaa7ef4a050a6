"""Ferret as its paper states it (arXiv 2409.06277, algorithm 1): sum K_l = K, gamma_l = V_l^T delta_l /
(rho_l K_l), and a server that steps along the mean of the reconstructions. A new seed for each client and
round:

    update     contract int, seed int, gammas float32 [K]; with `ferret.coordinates` of fewer bits, what
               `coordinates` makes of them
    broadcast  contract int, step float, updates as the clients sent them and, where some are clipped, factors
               float64, one an update; round 0's has the contract only

or, with `ferret.seeds: shared-round`, one for all clients of a round:

    update     the same, with the seed that the last broadcast announced
    broadcast  contract int, step float, gammas float32 [K], next_seed int; round 0's: contract, next_seed

The step is the plain one or that of an optimiser, which every party keeps (see `server_optimizer`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

import ferret_ext
from ferret_ext import Packed
from ferret_ext.federated import coordinates, wire
from ferret_ext.federated.algorithms.base import (
    Algorithm,
    LocalData,
    Train,
    Values,
    check,
    rounded,
    stream_contract,
)
from ferret_ext.federated.algorithms.plans import PlanReplica, make_plan
from ferret_ext.federated.algorithms.server_optimizer import ServerOptimizer
from ferret_ext.federated.algorithms.updates import ALL_RULES, Updates
from ferret_ext.federated.config import FerretConfig, ServerConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.privacy import ClientSide
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message, WireError

BY_NORM = ("norm", "sqrt-norm", "mse", "curvature")
P = TypeVar("P", bound=PlanReplica)


@dataclass(frozen=True)
class Projecting(Algorithm[P]):
    """What does not depend on whose the seeds are.

    K_l must be known to everybody before the round. An allocation by norm therefore takes the norms of the
    last round, which all derive from the coordinates that the server relayed; round 1 goes by sqrt-size.
    """

    config: FerretConfig
    server_learning_rate: float
    train: Train
    privacy: ClientSide | None = field(default=None, kw_only=True)
    server: ServerConfig = field(default_factory=ServerConfig, kw_only=True)

    def notes(self, replica: P) -> list[str]:
        size = sum(param.numel() for param in replica.params)
        if size > replica.plan.K:
            return []
        return [
            f"ferret: {replica.plan.K:,} coordinates are no fewer than the {size:,} trainable parameters: "
            "fedavg sends as much and loses nothing; lower ferret.K"
        ]

    def opening(self, replica: P) -> Values:
        return {"contract": self.contract}

    def begin(self, replica: P, broadcast: Message) -> None:
        broadcast.only(*self.opening(replica))
        check(self.name, "broadcast", "contract", self.contract, broadcast.value("contract", int))

    def check_values(self, replica: P, update: Message) -> None:
        update.only("contract", "seed", *coordinates.names(self.config.chosen_coordinates))
        check(self.name, update.sender, "contract", self.contract, update.value("contract", int))
        update.seed("seed")
        self.gammas(replica, update)

    def norm(self, replica: P, update: Message) -> float:
        """The Euclidean norm of the coordinates."""
        return float(np.linalg.norm(self.floats(replica, update).astype(float)))

    def gammas(self, replica: P, update: Message) -> Tensor | Packed:
        """An update's coordinates. Raises WireError."""
        return coordinates.read(update, replica.plan, self.config.chosen_coordinates)

    def floats(self, replica: P, update: Message) -> coordinates.Floats:
        """An update's coordinates float32 [K]."""
        return coordinates.values(replica.plan, self.gammas(replica, update))

    @property
    def contract(self) -> int:
        return stream_contract(self.config.chosen_basis)

    def project(self, replica: P, data: LocalData, seed: int, watch: Stopwatch) -> tuple[Values, float]:
        """Trains; the update's values by the basis of this seed, and the training loss."""
        with watch("local"):
            loss = self.train(replica.model, data.examples, derive(data.seed, "training"), data.client)
        with watch("project"):
            plan, kind = replica.plan, self.config.chosen_coordinates
            columns = coordinates.candidates(replica.part, kind)
            gammas = replica.project(columns, seed, self.config.chosen_basis)
            if self.privacy is not None:
                (gammas,) = self.privacy.protect([gammas], data.round, data.client)
                loss = math.nan  # it would tell of the client's records
            written = coordinates.write(gammas, plan, kind)
        return {"contract": self.contract, "seed": seed, **written}, loss

    def walk(self, replica: P, terms: Sequence[tuple[int, Tensor | Packed, float]], step: float) -> None:
        """The round's step, over (seed, gammas, share)."""
        by_chance = self.config.rounding == "stochastic"
        replica.walk(terms, step, self.config.chosen_basis, by_chance=by_chance)

    def step(self, round_: int) -> float:
        """The server's step in a round."""
        warmup = max(1, self.config.chosen_server_warmup)
        return self.server_learning_rate * min(1.0, round_ / warmup)

    @abstractmethod
    def relayed(self, replica: P, broadcast: Message) -> tuple[list[wire.Array], list[float]]:
        """The coordinates float32 [K] that a round's broadcast tells everybody, and their weights."""

    def allocate(self, replica: P, broadcast: Message) -> None:
        """The next round's K_l, where they go by the norms of this round's updates."""
        if self.config.allocation in BY_NORM:
            norms = block_norms(replica.plan, *self.relayed(replica, broadcast))
            replica.plan = replica.plan.with_allocation(self.config.allocation, norms=norms)


@dataclass(frozen=True)
class Ferret(Projecting[PlanReplica]):
    """w_r = w_{r-1} - step * mean_i V_i gamma_i, over the round's clients i."""

    name = "ferret"

    def replicate(self, model: Any) -> PlanReplica:
        plan = first_plan(self.config, model)
        params = plan.select(model.named_parameters())
        return PlanReplica(model, params, plan=plan, optimizer=ServerOptimizer.on(self.server, params))

    def contribute(self, replica: PlanReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        return self.project(replica, data, derive(data.seed, "basis"), watch)

    def combine(self, replica: PlanReplica, updates: Updates) -> Values:
        values: dict[str, wire.Value] = {"contract": self.contract, "step": self.step(replica.round + 1)}
        if any(factor != 1 for factor in updates.factors):
            values["factors"] = np.array(updates.factors)
        return {**values, "updates": list(updates.received)}

    def advance(self, replica: PlanReplica, broadcast: Message) -> None:
        broadcast.only("contract", "step", "updates", optional=["factors"])
        check(self.name, "broadcast", "contract", self.contract, broadcast.value("contract", int))
        updates = self._updates_in(broadcast)
        for update in updates.messages:
            self.check_update(replica, update)
        seeds = [update.seed("seed") for update in updates.messages]
        gammas = [self.gammas(replica, update) for update in updates.messages]
        terms = list(zip(seeds, gammas, updates.shares, strict=True))
        self.walk(replica, terms, broadcast.value("step", float))
        self.allocate(replica, broadcast)

    def relayed(self, replica: PlanReplica, broadcast: Message) -> tuple[list[wire.Array], list[float]]:
        updates = self._updates_in(broadcast)
        squares = [share * factor for share, factor in zip(updates.shares, updates.factors, strict=True)]
        return [self.floats(replica, update) for update in updates.messages], squares

    def seeds(self, message: Message) -> list[int]:
        if message.kind == "update":
            return [message.seed("seed")]
        return [update.seed("seed") for update in self._updates_in(message).messages]

    def _updates_in(self, broadcast: Message) -> Updates:
        """What a broadcast relays. Round 0's relays nothing."""
        received = broadcast.value("updates", list) if broadcast.round else []
        factors = [1.0] * len(received)
        if "factors" in broadcast.values:
            factors = broadcast.array("factors", "<f8", (len(received),)).tolist()
            if unfit := [factor for factor in factors if not 0 <= factor <= 1]:
                raise WireError(f"{self.name}: broadcast must have factors in [0, 1], got {unfit[0]:.6g}")
        return Updates([wire.decode(update) for update in received], received, factors)


@dataclass(kw_only=True)
class SharedReplica(PlanReplica):
    """A replica and the seed that the next round's clients share."""

    next_seed: int = 0

    def state(self) -> Values:
        return {**super().state(), "next_seed": self.next_seed}

    def resume(self, state: Message) -> None:
        super().resume(state)
        self.next_seed = state.seed("next_seed")


@dataclass(frozen=True)
class SharedFerret(Projecting[SharedReplica]):
    """w_r = w_{r-1} - step * V mean_i gamma_i, V the basis of round r for all its clients.

    Coordinates on one basis can be averaged, so that the server relays K numbers however many clients there
    are, and by their median. But the noise of the projection no longer averages out over the clients: beside
    the mean of updates that are alike it is sqrt(N) times that of N clients with bases of their own.

    seed: every round's follows from it.
    """

    name = "ferret-round"
    rules = ALL_RULES
    relays: ClassVar[tuple[str, ...]] = ("contract", "step", "gammas", "next_seed")
    seed: int

    def replicate(self, model: Any) -> SharedReplica:
        plan = first_plan(self.config, model)
        params = plan.select(model.named_parameters())
        return SharedReplica(model, params, plan=plan, optimizer=ServerOptimizer.on(self.server, params))

    def opening(self, replica: SharedReplica) -> Values:
        return {**super().opening(replica), "next_seed": self._seed_of(1)}

    def begin(self, replica: SharedReplica, broadcast: Message) -> None:
        super().begin(replica, broadcast)
        replica.next_seed = broadcast.seed("next_seed")

    def contribute(self, replica: SharedReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        return self.project(replica, data, replica.next_seed, watch)

    def check_values(self, replica: SharedReplica, update: Message) -> None:
        super().check_values(replica, update)
        check(self.name, update.sender, "seed", replica.next_seed, update.value("seed", int))

    def combine(self, replica: SharedReplica, updates: Updates) -> Values:
        mean = updates.average(lambda update: torch.from_numpy(self.floats(replica, update).astype(float)))
        return self.broadcast_of(replica, rounded(mean.numpy()))

    def broadcast_of(self, replica: SharedReplica, mean: coordinates.Floats) -> dict[str, wire.Value]:
        """The values that relay this mean."""
        return {
            "contract": self.contract,
            "step": self.step(replica.round + 1),
            "gammas": mean,
            "next_seed": self._seed_of(replica.round + 2),
        }

    def advance(self, replica: SharedReplica, broadcast: Message) -> None:
        broadcast.only(*self.relays)
        check(self.name, "broadcast", "contract", self.contract, broadcast.value("contract", int))
        gammas = broadcast.array("gammas", "<f4", (replica.plan.K,))
        step, next_seed = broadcast.value("step", float), broadcast.seed("next_seed")
        terms = [(replica.next_seed, torch.from_numpy(gammas.copy()), 1.0)]
        self.walk(replica, terms, step)
        self.allocate(replica, broadcast)
        replica.next_seed = next_seed

    def relayed(self, replica: SharedReplica, broadcast: Message) -> tuple[list[wire.Array], list[float]]:
        return [broadcast.array("gammas", "<f4", (replica.plan.K,))], [1.0]

    def _seed_of(self, round_: int) -> int:
        return derive(self.seed, "basis", round_)


def first_plan(config: FerretConfig, model: Any) -> ferret_ext.BlockPlan:
    """The plan of round 1, when no norms are known. Raises ConfigError."""
    allocation = "sqrt-size" if config.allocation in BY_NORM else config.allocation
    plan = make_plan(model, config.K, config.chosen_granularity, allocation)
    if config.granularity == "auto":
        plan = plan.divided(coordinates.most_a_block(config.chosen_coordinates))
    try:
        coordinates.candidates(plan, config.chosen_coordinates)
    except ValueError as error:
        raise ConfigError(f"ferret.coordinates: {error}; lower ferret.K") from None
    return plan


def block_norms(
    plan: ferret_ext.BlockPlan, gammas: Sequence[wire.Array], weights: Sequence[float]
) -> list[float]:
    """The root of the weighted sum over the updates of each block's ||delta_l||^2, from public coordinates.

    E||gamma_l||^2 = ||delta_l||^2 / (rho_l K_l) and rho_l ~ 1 / d_l, so K_l / d_l ||gamma_l||^2 estimates
    ||delta_l||^2 without bias, up to a factor that all blocks share. Sums are exact (fsum), so that all
    parties get the same K_l.
    """
    norms = []
    for block, start in zip(plan.blocks, plan.starts, strict=True):
        squares = (
            weight * gamma**2
            for weight, values in zip(weights, gammas, strict=True)
            for gamma in values[start : start + block.k].astype(float).tolist()
        )
        norms.append(math.sqrt(block.k / block.numel * math.fsum(squares)))
    return norms
