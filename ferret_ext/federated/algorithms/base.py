"""An algorithm: how a client turns its data into bytes, and the server turns those into the next model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.metrics import Stopwatch

Train = Callable[
    [Any, Sequence[Example], int], float
]  # model, examples, seed -> mean loss; changes the model


@dataclass
class Replica:
    """One party's copy of the global model, as it stands after `round`.

    params: the trainable parameters, changed in place. start: a client's copy of them as its round began.
    """

    model: Any
    params: list[Tensor]
    round: int = 0
    start: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def mark(self) -> None:
        """Remembers the parameters as the round's start."""
        if not self.start:
            self.start = [torch.empty_like(param) for param in self.params]
        for start, param in zip(self.start, self.params, strict=True):
            start.copy_(param)

    @torch.no_grad()
    def rewind(self) -> None:
        """Goes back to the last start, if there was one, undoing the local training since."""
        if self.start:
            for param, start in zip(self.params, self.start, strict=True):
                param.copy_(start)


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True)
class LocalData:
    """What one client brings to one round. `seed` is its own for this round."""

    client: int
    round: int
    seed: int
    examples: Sequence[Example]


@dataclass(frozen=True)
class Reply:
    """What comes back from a client: the message for the server, and what was measured on the way."""

    client: int
    payload: bytes
    payload_bytes_down: int
    train_loss: float
    watch: Stopwatch


class Algorithm(ABC, Generic[R]):
    """A federated algorithm. Server and clients each hold a replica and exchange nothing but bytes.

    A broadcast is what the server relays after a round. Rebuilding applies one to a replica; server and
    clients rebuild from the same bytes, so that they hold the same weights, bit for bit.
    """

    @abstractmethod
    def replicate(self, model: Any) -> R:
        """A replica on `model`, at round 0."""

    @abstractmethod
    def open(self, replica: R) -> bytes:
        """Round 0's broadcast, which opens the run."""

    @abstractmethod
    def rebuild(self, replica: R, broadcast: bytes) -> None:
        """Takes the replica from round r - 1 to r with round r's broadcast; does nothing if it is there."""

    @abstractmethod
    def train_and_encode(self, replica: R, data: LocalData, watch: Stopwatch) -> tuple[bytes, float]:
        """Trains on the client's data and encodes the update; also the training loss."""

    @abstractmethod
    def aggregate(self, replica: R, updates: Sequence[bytes]) -> bytes:
        """The next round's broadcast from its clients' messages, once checked; the replica stays as it is."""

    def client_update(self, replica: R, data: LocalData, broadcasts: Sequence[bytes]) -> Reply:
        """A client's part of a round: rebuild the global model from what the server relays, train, encode."""
        watch = Stopwatch()
        with watch("rebuild"):
            replica.rewind()
            for broadcast in broadcasts:
                self.rebuild(replica, broadcast)
            replica.mark()
        payload, loss = self.train_and_encode(replica, data, watch)
        return Reply(data.client, payload, sum(map(len, broadcasts)), loss, watch)

    def server_apply(self, replica: R, updates: Sequence[bytes]) -> bytes:
        """The server's part of a round: w_r from the clients' messages; returns the broadcast."""
        broadcast = self.aggregate(replica, updates)
        self.rebuild(replica, broadcast)
        return broadcast
