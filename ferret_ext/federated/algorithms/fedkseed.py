"""FedKSeed and FedKSeed-Pro (Qin et al., ICML 2024, arXiv 2312.06353): zeroth-order steps along K candidate
directions, so that a model is its base and K sums of slopes, w_r = w_0 - learning_rate sum_j a_j z_j.

    update     candidates uint16 (uint32 for K > 65536) [n], slopes float32 [n]: a pair for each finite slope
    broadcast  seed int, from which the candidates' seeds follow, and, but in round 0, sums float32 [K];
               Pro: also magnitudes float32 [K] and visits uint32 [K]

A broadcast holds all that came before it: whoever joins late needs w_0 and the newest one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import (
    Algorithm,
    LocalData,
    Replica,
    Values,
    check_multiples,
    rounded,
)
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import ZerothOrderConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.seeds import derive, derive_many
from ferret_ext.federated.wire import Array, Message, WireError
from ferret_ext.federated.zeroth_order import Loss, Snapshot, Walk, agreement, given

MINMAX_FLOOR = 1e-10  # keeps min-max scaling from dividing by 0, as in the authors' code


@dataclass(kw_only=True)
class KSeedReplica(Replica):
    """A replica that is rebuilt from w_0 and the sums, not from the round before.

    base: w_0. snapshot: the weights as a client's round began, quicker to go back to than to rebuild. seeds:
    of the K candidates. sums: a_j [K]. magnitudes [K]: sum |g| so far of each candidate, g clipped; visits
    [K]: how many g those were. moved: local steps have been made since the weights were rebuilt.
    """

    walk: Walk
    base: Snapshot
    snapshot: Snapshot
    rate: float  # server_learning_rate learning_rate
    sums: Array
    magnitudes: Array
    visits: Array
    seeds: list[int] = field(default_factory=list)
    moved: bool = False

    @property
    def digest(self) -> bytes:
        settings = f"{agreement(self.walk.config)} {self.rate!r} {self.sums.size}"
        return hashlib.sha256(super().digest + settings.encode()).digest()[: wire.DIGEST_BYTES]

    def mark(self) -> None:
        self.snapshot.take(self.params)

    def rewind(self) -> None:
        if self.moved:
            self.snapshot.restore(self.params)
            self.moved = False

    def state(self) -> Values:
        return {
            "seeds": np.array(self.seeds, np.uint64),
            "sums": self.sums,
            "magnitudes": self.magnitudes,
            "visits": self.visits,
        }

    def resume(self, state: Message) -> None:
        shape = self.sums.shape
        self.seeds = state.array("seeds", "<u8", shape).tolist()
        self.sums, self.magnitudes = (state.array(name, "<f4", shape) for name in ("sums", "magnitudes"))
        self.visits = state.array("visits", "<u4", shape)

    @torch.no_grad()
    def restore(self) -> None:
        """w_0 - rate sum_j a_j z_j: each parameter is rounded once, whatever the number of rounds."""
        self.base.restore(self.params)
        terms = [(seed, -self.rate * a) for seed, a in zip(self.seeds, self.sums.tolist(), strict=False) if a]
        if terms:
            self.walk.directions.add_(self.params, terms)
        self.moved = False


@dataclass(frozen=True)
class FedKSeed(Algorithm[KSeedReplica]):
    """T local steps, each along a candidate drawn anew; a_j += sum_i weight_i g_ij, never reset.

    config: with the published values filled in. seed: the candidates' seeds follow from it. loss: of a model
    on a batch, of `batch_size` examples.
    """

    name = "fedkseed"
    _statistics: ClassVar[tuple[str, ...]] = ()  # what a broadcast has beside seed and sums
    self_contained = True
    weighting = "examples"
    config: ZerothOrderConfig
    server_learning_rate: float
    seed: int
    loss: Loss
    batch_size: int = 1

    def replicate(self, model: Any) -> KSeedReplica:
        walk = Walk.on(model, self.loss, self.batch_size, self.config)
        base, snapshot = (Snapshot(self.config.snapshot == "disk") for _ in range(2))
        base.take(walk.params)
        count, rate = (
            self.config.candidate_seeds,
            self.server_learning_rate * given(self.config.learning_rate),
        )
        zeros = np.zeros(count, np.float32)
        visits = np.zeros(count, np.uint32)
        return KSeedReplica(
            model,
            list(walk.params),
            walk=walk,
            base=base,
            snapshot=snapshot,
            rate=rate,
            sums=zeros,
            magnitudes=zeros,
            visits=visits,
        )

    def opening(self, replica: KSeedReplica) -> Values:
        return {"seed": self.seed}

    def begin(self, replica: KSeedReplica, broadcast: Message) -> None:
        broadcast.only("seed")
        replica.seeds = self._candidates(replica, broadcast)

    def contribute(self, replica: KSeedReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        steps, perturbations = given(self.config.steps), given(self.config.perturbations)
        random = np.random.Generator(np.random.PCG64(derive(data.seed, "candidates")))
        drawn = random.choice(len(replica.seeds), (steps, perturbations), p=self.odds(replica))
        seeds = [[replica.seeds[j] for j in row] for row in drawn.tolist()]
        with watch("local"):
            replica.moved = True
            slopes, loss = replica.walk.run(
                data.examples, derive(data.seed, "training"), seeds, last_step=False
            )
        made = np.isfinite(slopes)
        return {
            "candidates": drawn[made].astype(self._index_dtype),
            "slopes": (slopes[made] / perturbations).astype(np.float32),
        }, loss

    def check_values(self, replica: KSeedReplica, update: Message) -> None:
        self._pairs(update)

    def combine(self, replica: KSeedReplica, updates: Updates) -> Values:
        sums = replica.sums.astype(np.float64)
        for update, share in zip(updates.messages, updates.shares, strict=True):
            candidates, slopes = self._pairs(update)
            np.add.at(sums, candidates, share * slopes)
        return {"seed": self.seed, "sums": rounded(sums)}

    def advance(self, replica: KSeedReplica, broadcast: Message) -> None:
        broadcast.only("seed", "sums", *self._statistics)
        seeds = self._candidates(replica, broadcast)
        sums = broadcast.array("sums", "<f4", replica.sums.shape)
        check_multiples(self.name, replica.rate, sums)
        replica.seeds, replica.sums = seeds, sums
        replica.restore()

    def odds(self, replica: KSeedReplica) -> npt.NDArray[np.float64] | None:
        """How likely a step takes each candidate [K]; none: all alike."""
        return None

    @property
    def _index_dtype(self) -> str:
        return "<u2" if self.config.candidate_seeds <= 1 << 16 else "<u4"

    def _candidates(self, replica: KSeedReplica, broadcast: Message) -> list[int]:
        return derive_many(broadcast.seed("seed"), "candidate", replica.sums.size)

    def _pairs(self, update: Message) -> tuple[Array, npt.NDArray[np.float64]]:
        """The update's candidates and slopes [n], once checked. Raises WireError."""
        update.only("candidates", "slopes")
        count = update.value("candidates", np.ndarray).size
        most = given(self.config.steps) * given(self.config.perturbations)
        if count > most:
            raise self._unfit(update, f"at most {most} candidates", count)
        candidates = update.array("candidates", self._index_dtype, (count,))
        highest = int(candidates.max(initial=0))
        if highest >= self.config.candidate_seeds:
            raise self._unfit(update, f"candidates below {self.config.candidate_seeds}", highest)
        return candidates, update.array("slopes", "<f4", candidates.shape).astype(np.float64)

    def _unfit(self, update: Message, expected: str, got: int) -> WireError:
        return WireError(f"{self.name}: {update.sender} must have {expected}, got {got}")


@dataclass(frozen=True)
class FedKSeedPro(FedKSeed):
    """Steps take candidates with odds softmax(minmax(mean |g|)), recomputed each round, g clipped.

    As in the authors' code, a candidate's mean counts one slope of 0 beside those that were measured, so that
    those not yet visited have the least odds.
    """

    name = "fedkseed-pro"
    _statistics = ("magnitudes", "visits")

    def combine(self, replica: KSeedReplica, updates: Updates) -> Values:
        magnitudes, visits = replica.magnitudes.astype(np.float64), replica.visits.copy()
        for update in updates.messages:
            candidates, slopes = self._pairs(update)
            measured = np.abs(slopes) * given(self.config.perturbations)
            np.add.at(magnitudes, candidates, np.minimum(measured, self.config.clip))
            np.add.at(visits, candidates, 1)
        statistics = {"magnitudes": rounded(magnitudes), "visits": visits}
        return {**super().combine(replica, updates), **statistics}

    def advance(self, replica: KSeedReplica, broadcast: Message) -> None:
        shape = replica.sums.shape
        magnitudes, visits = (
            broadcast.array("magnitudes", "<f4", shape),
            broadcast.array("visits", "<u4", shape),
        )
        super().advance(replica, broadcast)
        replica.magnitudes, replica.visits = magnitudes, visits

    def odds(self, replica: KSeedReplica) -> npt.NDArray[np.float64]:
        mean = replica.magnitudes.astype(np.float64) / (replica.visits.astype(np.float64) + 1)
        scaled = (mean - mean.min()) / (mean.max() - mean.min() + MINMAX_FLOOR)
        odds: npt.NDArray[np.float64] = np.exp(scaled) / np.exp(scaled).sum()
        return odds
