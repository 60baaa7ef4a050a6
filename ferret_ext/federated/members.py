"""Clients of a run: what each brings to a round, whichever engine carries its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica, Reply, Weighting
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.secure.participant import Participant
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
        participants: Mapping[int, Participant] | None = None,
        *,
        start_on_host: bool = False,
    ) -> None:
        """shards, weights: each client's examples, and what it counts for. seed: the run's. participants:
        what masks their updates; new ones unless given. start_on_host: of the replica."""
        self.algorithm = algorithm
        self.replica: Replica = algorithm.replicate(model)
        self.replica.start_on_host = start_on_host
        self._shards = shards
        self._weights = weights
        self._seed = seed
        self._participants = participants or {client: Participant(client) for client in shards}

    def update(self, client: int, round_: int, broadcasts: Sequence[bytes], invitation: bytes = b"") -> Reply:
        """The client's part of the round; see `Algorithm.client_update`. invitation: the assembly's."""
        seed = derive(self._seed, "client", round_, client)
        own = self._shards[client], self._weights[client]
        data = LocalData(client, round_, seed, *own, self._participants[client], invitation)
        reply = self.algorithm.client_update(self.replica, data, broadcasts)
        return replace(reply, payload_bytes_down=reply.payload_bytes_down + len(invitation))

    def reply(self, client: int, request: bytes) -> Reply:
        """The client's answer to a request, or why there is none."""
        return self._participants[client].reply(request)


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
