"""Ferret as its paper states it (arXiv 2409.06277, algorithm 1): a new seed for each client and round, sum
K_l = K, gamma_l = V_l^T delta_l / (rho_l K_l), and a server that steps along the mean of the reconstructions.

    update     contract int, seed int, gammas float32 [K]
    broadcast  contract int, step float, updates as the clients sent them and, where some are clipped, factors
               float64, one an update; round 0's has the contract only
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import (
    Algorithm,
    LocalData,
    Train,
    Values,
    check,
    stream_contract,
)
from ferret_ext.federated.algorithms.plans import PlanReplica, make_plan
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.wire import Message

BY_NORM = ("norm", "sqrt-norm", "mse")
VALUES = ["contract", "gammas", "seed"]


@dataclass(frozen=True)
class Ferret(Algorithm[PlanReplica]):
    """w_r = w_{r-1} - server_learning_rate * mean_i V_i gamma_i, over the round's clients i.

    K_l must be known to everybody before the round. An allocation by norm therefore takes the norms of the
    last round, which all derive from the coordinates that the server relayed; round 1 goes by size.
    """

    name = "ferret"
    config: FerretConfig
    server_learning_rate: float
    train: Train

    def replicate(self, model: Any) -> PlanReplica:
        allocation = "size" if self.config.allocation in BY_NORM else self.config.allocation
        plan = make_plan(model, self.config.K, self.config.chosen_granularity, allocation)
        return PlanReplica(model, plan.select(model.named_parameters()), plan=plan)

    def notes(self, replica: PlanReplica) -> list[str]:
        size = sum(param.numel() for param in replica.params)
        if size > replica.plan.K:
            return []
        return [
            f"ferret: {replica.plan.K:,} coordinates are no fewer than the {size:,} trainable parameters: "
            "fedavg sends as much and loses nothing; lower ferret.K"
        ]

    def opening(self, replica: PlanReplica) -> Values:
        return {"contract": self.contract}

    def begin(self, replica: PlanReplica, broadcast: Message) -> None:
        check(self.name, "broadcast", "contract", self.contract, broadcast.value("contract", int))

    def contribute(self, replica: PlanReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        with watch("local"):
            loss = self.train(replica.model, data.examples, derive(data.seed, "training"), data.client)
        seed = derive(data.seed, "basis")
        with watch("project"):
            gammas = ferret_ext.project_difference(
                replica.plan, replica.start, replica.params, seed, basis=self.config.chosen_basis
            )
        return {"contract": self.contract, "seed": seed, "gammas": gammas.float().cpu().numpy()}, loss

    def combine(self, replica: PlanReplica, updates: Updates) -> Values:
        values: dict[str, wire.Value] = {"contract": self.contract, "step": self.server_learning_rate}
        if any(factor != 1 for factor in updates.factors):
            values["factors"] = np.array(updates.factors)
        return {**values, "updates": list(updates.received)}

    def advance(self, replica: PlanReplica, broadcast: Message) -> None:
        updates = self._updates_in(broadcast)
        for update in updates.messages:
            self.check_update(replica, update)
        device = replica.params[0].device
        terms = [
            (update.value("seed", int), torch.from_numpy(update.values["gammas"]).to(device), share)
            for update, share in zip(updates.messages, updates.shares, strict=True)
        ]
        step = broadcast.value("step", float)
        with torch.no_grad():
            ferret_ext.apply_(replica.plan, replica.params, terms, -step, basis=self.config.chosen_basis)
        if self.config.allocation in BY_NORM:
            squares = [share * factor for share, factor in zip(updates.shares, updates.factors, strict=True)]
            gammas = [update.value("gammas", np.ndarray) for update in updates.messages]
            norms = block_norms(replica.plan, gammas, squares)
            replica.plan = replica.plan.with_allocation(self.config.allocation, norms=norms)

    @property
    def contract(self) -> int:
        return stream_contract(self.config.chosen_basis)

    def check_values(self, replica: PlanReplica, update: Message) -> None:
        check(self.name, update.sender, "contract", self.contract, update.value("contract", int))
        check(self.name, update.sender, "seed below 2^64", True, update.value("seed", int) >= 0)
        update.array("gammas", "<f4", (replica.plan.K,))
        check(self.name, update.sender, "values", VALUES, sorted(update.values))  # all of it is relayed

    def seeds(self, message: Message) -> list[int]:
        if message.kind == "update":
            return [message.value("seed", int)]
        return [update.value("seed", int) for update in self._updates_in(message).messages]

    def _updates_in(self, broadcast: Message) -> Updates:
        """What a broadcast relays. Round 0's relays nothing."""
        received = broadcast.value("updates", list) if broadcast.round else []
        factors = [1.0] * len(received)
        if "factors" in broadcast.values:
            factors = broadcast.array("factors", "<f8", (len(received),)).tolist()
        return Updates([wire.decode(update) for update in received], received, factors)


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
