"""Clients of a run: what each brings to a round, whichever engine carries its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica, Reply, Weighting
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.seeds import derive


class Members:
    """Clients that share one replica.

    All clients hold the same weights once they have rebuilt, so one replica does for several: its model is
    what the client whose turn it is trains, and its start is what the next one goes back to.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any],
        model: Any,
        shards: Mapping[int, Sequence[Example]],
        weights: Mapping[int, float],
        seed: int,
    ) -> None:
        """shards, weights: each client's examples, and what it counts for. seed: the run's."""
        self.algorithm = algorithm
        self.replica: Replica = algorithm.replicate(model)
        self._shards = shards
        self._weights = weights
        self._seed = seed

    def update(self, client: int, round_: int, broadcasts: Sequence[bytes]) -> Reply:
        """The client's part of the round; see `Algorithm.client_update`."""
        seed = derive(self._seed, "client", round_, client)
        data = LocalData(client, round_, seed, self._shards[client], self._weights[client])
        return self.algorithm.client_update(self.replica, data, broadcasts)


def client_weights(
    config: SimulationConfig, algorithm: Algorithm[Any], shards: Sequence[Sequence[Example]]
) -> list[float]:
    """What each client counts for in means: 1, its number of examples, or its number of batches."""
    by = weighting(config, algorithm)
    if by == "uniform":
        return [1.0] * len(shards)
    size = config.training.per_device_train_batch_size if by == "batches" else 1
    return [float(math.ceil(len(shard) / size)) for shard in shards]


def weighting(config: SimulationConfig, algorithm: Algorithm[Any]) -> Weighting:
    """What clients count by. All alike where sums are private: one must not change what another counts."""
    if config.client_weights != "auto":
        return config.client_weights
    return algorithm.weighting if config.privacy.noise == "none" else "uniform"
