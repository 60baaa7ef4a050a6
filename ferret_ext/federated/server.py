"""The server: draws the clients, turns their messages into the next model, and keeps what it relayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import numpy as np

from ferret_ext.federated.algorithms.base import Algorithm, R
from ferret_ext.federated.seeds import derive


class Server(Generic[R]):
    """The global model and the broadcasts that led to it, one a round from round 0 on; b"" for one that was
    superseded."""

    def __init__(
        self, algorithm: Algorithm[R], model: Any, clients: Sequence[int], fraction: float, seed: int
    ) -> None:
        self.algorithm = algorithm
        self.replica = algorithm.replicate(model)
        self.broadcasts = [algorithm.open(self.replica)]
        algorithm.rebuild(self.replica, self.broadcasts[0])
        self._clients = clients
        self._num_chosen = max(1, round(fraction * len(clients)))
        self._seed = seed

    def choose(self, round_: int) -> list[int]:
        """The round's clients, in the order of all: the configured fraction of them, at least one."""
        random = np.random.Generator(np.random.PCG64(derive(self._seed, "clients", round_)))
        chosen = sorted(random.choice(len(self._clients), self._num_chosen, replace=False).tolist())
        return [self._clients[i] for i in chosen]

    def broadcasts_since(self, seen: int) -> list[bytes]:
        """What a client that has received `seen` broadcasts is still to receive."""
        return [broadcast for broadcast in self.broadcasts[seen:] if broadcast]

    def apply(self, updates: Sequence[bytes]) -> None:
        """w_r from the round's messages."""
        broadcast = self.algorithm.server_apply(self.replica, updates)
        if self.algorithm.self_contained and self.replica.round > 1:
            self.broadcasts[-1] = b""  # nobody needs it any more, and it may be as large as the model
        self.broadcasts.append(broadcast)
