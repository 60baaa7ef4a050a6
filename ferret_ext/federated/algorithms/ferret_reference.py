"""Ferret as its authors' code runs it, where that departs from the paper (`ferret.mode: reference-code`).

One pool of K seeds is drawn once and shared by all clients and rounds; here they are the K columns of one
basis, for every block anew. A client takes a random subset of the pool for each block, the larger the block's
update is. The server keeps a coefficient for each (block, seed), with momentum, and steps along their sum.

    update     seed int of the subsets, counts uint32 [L], gammas float32 [sum counts]
    broadcast  contract int, step float, pool float32 [L K]; round 0's: contract int, seed int of the pool
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ferret_ext
from ferret_ext.checks import KINDS
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
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message, WireError
from ferret_ext.ops import VARIANCE

FEWEST = 2  # seeds of a block, however small its update
LARGEST_NORM = 10.0  # of what one seed contributes to one block
LONGEST = {"rademacher": 1.0, "uniform": 1.0, "gaussian": 7.0}  # a basis vector's norm is at most this

Pool = npt.NDArray[np.float32]  # [L K], by block and seed


@dataclass(kw_only=True)
class PoolReplica(PlanReplica):
    """A replica with the pool's seed and its coefficients after the last round."""

    seed: int = 0
    pool: Pool

    def state(self) -> Values:
        return {**super().state(), "seed": self.seed, "pool": self.pool}

    def resume(self, state: Message) -> None:
        super().resume(state)
        self.seed, self.pool = state.seed("seed"), state.array("pool", "<f4", self.pool.shape)


@dataclass(frozen=True)
class FerretReference(Algorithm[PoolReplica]):
    """pool_r = m pool_{r-1} + sum_i p_i gamma_i,  w_r = w_{r-1} - step_r sum_k clip(pool_{r,l,k} v_{l,k})
    for every block l, with gamma_{i,l,k} = d_l / n_l v_{l,k}^T delta_{i,l} for the n_l seeds k of the subset
    and 0 for the others, n_l = max(int(||delta_l|| / max_l ||delta_l|| K), 2), and p_i the clients' shares.

    The step falls from server_learning_rate to ferret.slr_min. A contribution longer than 10 is clipped to
    10, one that is not finite left out.
    """

    name = "ferret-ref"  # on the wire, where it stands in every update
    weighting = "batches"
    config: FerretConfig
    server_learning_rate: float
    train: Train
    rounds: int
    seed: int  # of the pool

    def replicate(self, model: Any) -> PoolReplica:
        K = self.config.K
        if K < FEWEST:
            raise ConfigError(f"ferret.K: expected at least {FEWEST} seeds in the pool, got {K}")
        plan = make_plan(model, None, self.config.chosen_granularity, "equal")
        plan = plan.with_allocation("equal", K * len(plan.blocks))
        pool = np.zeros(plan.K, np.float32)
        return PoolReplica(model, plan.select(model.named_parameters()), plan=plan, pool=pool)

    def opening(self, replica: PoolReplica) -> Values:
        return {"contract": self.contract, "seed": self.seed}

    def begin(self, replica: PoolReplica, broadcast: Message) -> None:
        broadcast.only("contract", "seed")
        check(self.name, "broadcast", "contract", self.contract, broadcast.value("contract", int))
        replica.seed = broadcast.seed("seed")

    def contribute(self, replica: PoolReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        with watch("local"):
            loss = self.train(replica.model, data.examples, derive(data.seed, "training"), data.client)
        seed = derive(data.seed, "subsets")
        with watch("project"):
            counts = subset_sizes(replica.norms(), self.config.K)
            projected = replica.project(replica.part, replica.seed, self.config.chosen_basis)
            # project divides by rho_l K = VARIANCE K / d_l, the authors by n_l / d_l
            scale = VARIANCE[KINDS[self.config.chosen_basis]] * self.config.K / counts
            chosen = chosen_seeds(seed, counts, self.config.K)
            gammas = projected.double().cpu().numpy()[chosen] * np.repeat(scale, counts)
        values = {"counts": counts.astype(np.uint32), "gammas": gammas.astype(np.float32)}
        return {"seed": seed, **values}, loss

    def check_values(self, replica: PoolReplica, update: Message) -> None:
        update.only("seed", "counts", "gammas")
        update.seed("seed")
        counts = update.array("counts", "<u4", (len(replica.plan.blocks),)).astype(np.int64)
        unfit = counts[(counts < FEWEST) | (counts > self.config.K)]
        if unfit.size:
            expected = f"counts in [{FEWEST}, {self.config.K}]"
            raise WireError(f"{self.name}: {update.sender} must have {expected}, got {unfit[0]}")
        update.array("gammas", "<f4", (int(counts.sum()),))

    def combine(self, replica: PoolReplica, updates: Updates) -> Values:
        pool = self.config.pool_momentum * replica.pool.astype(np.float64)
        for share, update in zip(updates.shares, updates.messages, strict=True):
            counts, gammas = (update.value(name, np.ndarray) for name in ("counts", "gammas"))
            places = chosen_seeds(update.seed("seed"), counts.astype(np.int64), self.config.K)
            pool[places] += share * gammas.astype(np.float64)
        kept = rounded(pool)
        kept[~np.isfinite(kept)] = 0
        return {"contract": self.contract, "step": self.step(replica.round + 1), "pool": kept}

    def advance(self, replica: PoolReplica, broadcast: Message) -> None:
        broadcast.only("contract", "step", "pool")
        check(self.name, "broadcast", "contract", self.contract, broadcast.value("contract", int))
        pool: Pool = broadcast.array("pool", "<f4", (replica.plan.K,))
        step = broadcast.value("step", float)
        clipped = torch.from_numpy(self._clip(replica, pool))
        replica.walk([(replica.seed, clipped, 1.0)], step, self.config.chosen_basis)
        replica.pool = pool

    def step(self, round_: int) -> float:
        """The server's step in a round, from server_learning_rate in the first on down to slr_min."""
        done = (round_ - 1) / self.rounds
        high, low = self.server_learning_rate, self.config.slr_min
        left = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return low + (high - low) * left[self.config.slr_schedule] if high > low else high

    @property
    def contract(self) -> int:
        return stream_contract(self.config.chosen_basis)

    def _clip(self, replica: PoolReplica, pool: Pool) -> Pool:
        """The pool with every ||pool_lk v_lk|| at most 10; vectors are drawn only where they may matter."""
        clipped: Pool = pool.copy()
        basis = self.config.chosen_basis
        for place in np.flatnonzero(np.abs(pool) > LARGEST_NORM / LONGEST[basis]).tolist():
            block, k = replica.plan.blocks[place // self.config.K], place % self.config.K
            vector: Tensor = ferret_ext.basis(
                replica.seed, k, (block.numel,), basis=basis, offset=block.offset
            )
            norm = abs(float(pool[place])) * vector.double().norm().item()
            clipped[place] *= min(1.0, LARGEST_NORM / norm) if norm else 1.0
        return clipped


def subset_sizes(norms: Sequence[float], K: int) -> npt.NDArray[np.int64]:
    """n_l = max(int(||delta_l|| / max_l ||delta_l|| K), 2); 2 for all where nothing has changed."""
    largest = max(norms)
    return np.array([max(int(norm / largest * K) if largest else 0, FEWEST) for norm in norms])


def chosen_seeds(seed: int, counts: npt.NDArray[np.int64], K: int) -> npt.NDArray[np.int64]:
    """The places in the pool of a random subset of the K seeds for each block, ascending within a block."""

    def subsets() -> Iterator[npt.NDArray[np.int64]]:
        random = np.random.Generator(np.random.PCG64(seed))
        for block, count in enumerate(counts.tolist()):
            yield block * K + np.sort(random.permutation(K)[:count])

    return np.concatenate(list(subsets()))
