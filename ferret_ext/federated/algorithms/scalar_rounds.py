"""Rounds of scalars: the server names a round's directions, clients answer with how their losses change along
them, and everybody steps alike.

DeComFL (Li et al., ICLR 2025, arXiv 2405.15861) averages the slopes; FeedSign (Cai et al., arXiv 2501.17610)
takes the majority of their signs.

    update     slopes float32 [T, P], 0 where a loss was not finite;  FeedSign: votes int8 [1, P] of -1, 0, 1
    broadcast  next_seed int, from which the next round's directions follow, and, but in round 0, seed int,
               this round's, and the slopes or votes that everybody applies

A client that missed rounds applies the broadcasts of all of them: some 100 bytes each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
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
from ferret_ext.federated.algorithms.updates import ALL_RULES, Updates
from ferret_ext.federated.config import ZerothOrderConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Array, Message, WireError
from ferret_ext.federated.zeroth_order import (
    InPlace,
    Loss,
    Slopes,
    Snapshot,
    Walk,
    agreement,
    direction_seeds,
    given,
)


@dataclass(kw_only=True)
class ScalarReplica(Replica):
    """A replica and the seed of the next round's directions.

    snapshot: where training moves the weights, what it goes back to; none where they stay to the bit.
    """

    walk: Walk
    server_learning_rate: float
    snapshot: Snapshot | None
    next_seed: int = 0
    moved: bool = False

    @property
    def digest(self) -> bytes:
        settings = f"{agreement(self.walk.config)} {self.server_learning_rate!r}"
        return hashlib.sha256(super().digest + settings.encode()).digest()[: wire.DIGEST_BYTES]

    def state(self) -> Values:
        return {"next_seed": self.next_seed}

    def resume(self, state: Message) -> None:
        self.next_seed = state.seed("next_seed")

    def mark(self) -> None:
        if self.snapshot is not None:
            self.snapshot.take(self.params)

    def rewind(self) -> None:
        if self.snapshot is not None and self.moved:
            self.snapshot.restore(self.params)
            self.moved = False


@dataclass(frozen=True)
class DeComFL(Algorithm[ScalarReplica]):
    """w_r = w_{r-1} - server_learning_rate learning_rate / P sum_tp mean_i(g_itp) z_tp.

    config: with the published values filled in. seed: every round's directions follow from it. loss: of a
    model on a batch, of `batch_size` examples. With one step a round and a perturbation that leaves the
    weights alone, the weights stay as they are all through the round and nothing needs to be remembered.
    """

    name = "decomfl"
    multiples: ClassVar[str] = "slopes"  # what clients answer is called so
    rules = ALL_RULES
    config: ZerothOrderConfig
    server_learning_rate: float
    seed: int
    loss: Loss
    batch_size: int = 1

    def replicate(self, model: Any) -> ScalarReplica:
        walk = Walk.on(model, self.loss, self.batch_size, self.config)
        moves = given(self.config.steps) > 1 or isinstance(walk.perturbation, InPlace)
        snapshot = Snapshot(self.config.snapshot == "disk") if moves else None
        rate = self.server_learning_rate
        return ScalarReplica(
            model, list(walk.params), walk=walk, server_learning_rate=rate, snapshot=snapshot
        )

    def opening(self, replica: ScalarReplica) -> Values:
        return {"next_seed": self._seed_of(1)}

    def begin(self, replica: ScalarReplica, broadcast: Message) -> None:
        broadcast.only("next_seed")
        replica.next_seed = broadcast.seed("next_seed")

    def contribute(self, replica: ScalarReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        directions = direction_seeds(replica.next_seed, *self.shape)
        with watch("local"):
            replica.moved = True
            slopes, loss = replica.walk.run(
                data.examples, derive(data.seed, "training"), directions, last_step=False
            )
        return self.answer(slopes), loss

    def check_values(self, replica: ScalarReplica, update: Message) -> None:
        update.only(self.multiples)
        self.steps_of(update)

    def combine(self, replica: ScalarReplica, updates: Updates) -> Values:
        round_ = replica.round + 1
        return {
            "seed": self._seed_of(round_),
            "next_seed": self._seed_of(round_ + 1),
            **self.tally(updates),
        }

    @torch.no_grad()
    def advance(self, replica: ScalarReplica, broadcast: Message) -> None:
        broadcast.only("seed", "next_seed", self.multiples)
        seeds, next_seed = direction_seeds(broadcast.seed("seed"), *self.shape), broadcast.seed("next_seed")
        rate = self.server_learning_rate * given(self.config.learning_rate) / self.shape[1]
        steps = self.steps_of(broadcast)
        check_multiples(self.name, rate, steps)
        terms = [
            (seed, -rate * g)
            for row, slopes in zip(seeds, steps.tolist(), strict=True)
            for seed, g in zip(row, slopes, strict=True)
            if g
        ]
        if terms:
            replica.walk.directions.add_(replica.params, terms)
        replica.next_seed = next_seed

    def answer(self, slopes: Slopes) -> Values:
        """What a client says of its slopes [T, P]."""
        return {"slopes": np.nan_to_num(slopes, nan=0.0).astype(np.float32)}

    def tally(self, updates: Updates) -> Values:
        """What the server makes of the clients' answers."""
        mean = updates.average(lambda update: torch.from_numpy(self.steps_of(update).astype(np.float64)))
        return {"slopes": rounded(mean.numpy())}

    def steps_of(self, message: Message) -> Array:
        """The multiples [T, P] of the directions in an update or a broadcast. Raises WireError."""
        return message.array("slopes", "<f4", self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """T, P."""
        return given(self.config.steps), given(self.config.perturbations)

    def _seed_of(self, round_: int) -> int:
        return derive(self.seed, "directions", round_)


@dataclass(frozen=True)
class FeedSign(DeComFL):
    """w_r = w_{r-1} - server_learning_rate learning_rate / P sum_p sign(sum_i sign(g_ip)) z_p.

    Every client has one vote, however much data it has. A client whose loss is not finite abstains, and
    where votes are tied no step is made.
    """

    name = "feedsign"
    multiples = "votes"
    rules = ("mean",)  # a vote is a vote

    def replicate(self, model: Any) -> ScalarReplica:
        if self.shape[0] != 1:
            raise ConfigError(
                f"zeroth_order.steps: expected 1 with feedsign, whose clients vote on every step, "
                f"got {self.shape[0]}; raise zeroth_order.perturbations"
            )
        return super().replicate(model)

    def answer(self, slopes: Slopes) -> Values:
        return {"votes": np.sign(np.nan_to_num(slopes, nan=0.0)).astype(np.int8)}

    def tally(self, updates: Updates) -> Values:
        votes = sum(self.steps_of(update).astype(np.int64) for update in updates.messages)
        return {"votes": np.sign(votes).astype(np.int8)}

    def steps_of(self, message: Message) -> Array:
        votes = message.array("votes", "i1", self.shape)
        largest = int(np.abs(votes.astype(int)).max())
        if largest > 1:
            raise WireError(f"{self.name}: {message.sender} must have votes of -1, 0 or 1, got {largest}")
        return votes
