"""Which clients a round draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferret_ext.federated.seeds import derive


def count(clients: int, fraction: float, over_selection: float = 0.0) -> int:
    """How many of so many clients a round draws. over_selection: share that is drawn beyond `fraction`."""
    return min(clients, math.ceil(max(1, round(fraction * clients)) * (1 + over_selection)))


class Draws:
    """So many of the clients each round, by a seed that everybody knows.

    wanted: the updates that a round is after. expected: clients in a round, for means whose divisor must not
    depend on who comes. secret: nobody may learn who is drawn.
    """

    secret = False

    def __init__(
        self, clients: Sequence[int], fraction: float, seed: int, over_selection: float = 0.0
    ) -> None:
        """over_selection: share of clients that are drawn beyond `fraction`."""
        self.clients = clients
        self.wanted = count(len(clients), fraction)
        self.expected = float(self.wanted)
        self._count = count(len(clients), fraction, over_selection)
        self._seed = seed

    def of_round(self, round_: int) -> list[int]:
        """In the order of all clients."""
        random = np.random.Generator(np.random.PCG64(derive(self._seed, "clients", round_)))
        chosen = sorted(random.choice(len(self.clients), self._count, replace=False).tolist())
        return [self.clients[i] for i in chosen]


class SecretDraws(Draws):
    """Each client by a coin of its own, by a key that the server alone knows: Poisson sampling.

    A round waits for all that are drawn.
    """

    secret = True

    def __init__(self, clients: Sequence[int], fraction: float, key: int) -> None:
        """key: of 128 bits."""
        super().__init__(clients, fraction, key)
        self.wanted = len(clients)
        self.expected = fraction * len(clients)
        self._fraction = fraction

    def of_round(self, round_: int) -> list[int]:
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, round_])))
        coins = random.random(len(self.clients)) < self._fraction
        return [client for client, drawn in zip(self.clients, coins.tolist(), strict=True) if drawn]
