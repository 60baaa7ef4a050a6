"""Ferret as its paper states it (arXiv 2409.06277, algorithm 1): a new seed for each client and round, sum
K_l = K, gamma_l = V_l^T delta_l / (rho_l K_l), and a server that steps along the mean of the reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica, Train
from ferret_ext.federated.config import ConfigError, FerretConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.seeds import derive

BY_NORM = ("norm", "sqrt-norm", "mse")


@dataclass(kw_only=True)
class FerretReplica(Replica):
    """A replica and the plan that the next round's updates are projected with."""

    plan: ferret_ext.BlockPlan

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.plan.digest())[:8]


@dataclass(frozen=True)
class Ferret(Algorithm[FerretReplica]):
    """w_r = w_{r-1} - server_learning_rate * mean_i V_i gamma_i, over the round's clients i.

    K_l must be known to everybody before the round. An allocation by norm therefore takes the norms of the
    last round, which all derive from the coordinates that the server relayed; round 1 goes by size.
    """

    config: FerretConfig
    server_learning_rate: float
    train: Train

    def replicate(self, model: Any) -> FerretReplica:
        named = list(model.named_parameters())
        allocation = "size" if self.config.allocation in BY_NORM else self.config.allocation
        try:
            plan = ferret_ext.BlockPlan.from_parameters(
                named, self.config.K, granularity=self.config.granularity, allocation=allocation
            )
        except ValueError as error:
            raise ConfigError(f"ferret: {error}") from None
        return FerretReplica(model, plan.select(named), plan=plan)

    def open(self, replica: FerretReplica) -> bytes:
        return self._broadcast(replica, 0, [])

    def rebuild(self, replica: FerretReplica, broadcast: bytes) -> None:
        relayed = wire.decode_broadcast(broadcast)
        if relayed.round <= replica.round and replica.round > 0:
            return  # applied before
        if relayed.round > 0:
            _check("broadcast", "round", replica.round + 1, relayed.round)
        _check("broadcast", "plan", replica.digest.hex(), relayed.plan.hex())
        _check("broadcast", "basis", self.config.basis, relayed.basis)
        if relayed.round == 0:
            return  # it only opens the run
        weight = math.fsum(update.weight for update in relayed.updates)
        updates = [
            (
                update.seed,
                torch.from_numpy(update.gammas).to(replica.params[0].device),
                update.weight / weight,
            )
            for update in relayed.updates
        ]
        with torch.no_grad():
            ferret_ext.apply_(replica.plan, replica.params, updates, -relayed.step, basis=self.config.basis)
        replica.round = relayed.round
        if self.config.allocation in BY_NORM:
            norms = block_norms(replica.plan, relayed.updates)
            replica.plan = replica.plan.with_allocation(self.config.allocation, norms=norms)

    def train_and_encode(
        self, replica: FerretReplica, data: LocalData, watch: Stopwatch
    ) -> tuple[bytes, float]:
        with watch("local"):
            loss = self.train(replica.model, data.examples, derive(data.seed, "training"))
        seed = derive(data.seed, "basis")
        with watch("project"):
            gammas = ferret_ext.project_difference(
                replica.plan, replica.start, replica.params, seed, basis=self.config.basis
            )
        update = wire.Update(
            plan=replica.digest,
            basis=self.config.basis,
            round=data.round,
            client=data.client,
            seed=seed,
            weight=1.0,  # the paper's mean counts every client alike
            gammas=gammas.float().cpu().numpy(),
        )
        return wire.encode_update(update), loss

    def aggregate(self, replica: FerretReplica, updates: Sequence[bytes]) -> bytes:
        round_ = replica.round + 1
        received = [wire.decode_update(message) for message in updates]
        clients = [update.client for update in received]
        if not clients or len(set(clients)) < len(clients):
            raise wire.WireError(
                f"ferret: round {round_} must have one update from each client, got them from {clients}"
            )
        for update in received:
            sender = f"client {update.client}'s update"
            _check(sender, "round", round_, update.round)
            _check(sender, "plan", replica.digest.hex(), update.plan.hex())
            _check(sender, "basis", self.config.basis, update.basis)
            _check(sender, "number of coordinates", replica.plan.K, update.gammas.size)
        return self._broadcast(replica, round_, updates)

    def _broadcast(self, replica: FerretReplica, round_: int, updates: Sequence[bytes]) -> bytes:
        return wire.encode_broadcast(
            replica.digest, self.config.basis, round_, self.server_learning_rate, updates
        )


def block_norms(plan: ferret_ext.BlockPlan, updates: Sequence[wire.Update]) -> list[float]:
    """The root mean square over the clients of each block's ||delta_l||, from public coordinates alone.

    E||gamma_l||^2 = ||delta_l||^2 / (rho_l K_l) and rho_l ~ 1 / d_l, so K_l / d_l ||gamma_l||^2 estimates
    ||delta_l||^2 without bias, up to a factor that all blocks share. Sums are exact (fsum), so that all
    parties get the same K_l.
    """
    norms = []
    for block, start in zip(plan.blocks, plan.starts, strict=True):
        squares = (
            update.weight * float(gamma) ** 2
            for update in updates
            for gamma in update.gammas[start : start + block.k].tolist()
        )
        norms.append(math.sqrt(block.k / block.numel * math.fsum(squares)))
    return norms


def _check(what: str, field: str, expected: object, got: object) -> None:
    if expected != got:
        raise wire.WireError(f"ferret: {what} must have {field} {expected}, got {got}")
