"""A server and one client replica for all, around a small regression, as an engine would hold them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferret_ext.federated.admission import Sent
from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Reply
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.metrics import Rejection
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server


def toy() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))


def train(model: Any, data: Sequence[Example], seed: int, client: int = 0, steps: int = 5) -> float:
    """SGD steps on a regression drawn from the seed; the examples are not looked at."""
    random = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(20, 9, generator=random).to(next(model.parameters()).dtype)
    y = torch.randn(20, 3, generator=random).to(x.dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def data_of(client: int, round_: int, weight: float = 1.0) -> LocalData:
    return LocalData(client, round_, 100 * round_ + client, [], weight)


@dataclass
class Federation:
    """A run without an engine."""

    algorithm: Algorithm[Any]
    server: Server[Any]
    client: Any

    def replies(self, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> list[Reply]:
        """What the clients of the next round send; the round is not applied."""
        round_ = len(self.server.broadcasts)
        relayed = self.server.broadcasts_since(0)
        return [
            self.algorithm.client_update(self.client, data_of(client, round_, weight), relayed)
            for client, weight in enumerate(weights)
        ]

    def round(self, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> list[bytes]:
        """Plays the next round; the clients' messages."""
        messages = [reply.payload for reply in self.replies(weights)]
        self.apply(messages)
        return messages

    def apply(self, messages: Sequence[bytes]) -> list[Rejection]:
        return deliver(self.server, messages)

    def catch_up(self) -> None:
        """Takes the client to the server's round."""
        self.client.rewind()
        for broadcast in self.server.broadcasts_since(0):
            self.algorithm.rebuild(self.client, broadcast)


def federate(
    algorithm: Algorithm[Any], model: nn.Module | None = None, *, verify_weights: bool = True
) -> Federation:
    model = model or toy()
    client = algorithm.replicate(copy.deepcopy(model))
    server = Server(algorithm, model, range(3), 1.0, 0, verify_weights=verify_weights)
    return Federation(algorithm, server, client)


def deliver(server: Server[Any], messages: Sequence[bytes]) -> list[Rejection]:
    """Has the server take the messages of clients 0, 1, ..; what it rejects."""
    everybody = range(len(messages))
    return server.apply(everybody, list(map(Sent, everybody, messages)))[1]


def assert_only_the_first_is_refused(server: Server[Any], messages: Sequence[bytes], reason: str) -> None:
    """The round goes on with the others' messages, as if the first client had sent nothing."""
    others = copy.deepcopy(server)
    others.apply(range(len(messages)), [Sent(client, m) for client, m in enumerate(messages) if client])
    (rejection,) = deliver(server, messages)
    assert rejection.client == 0
    assert re.search(reason, rejection.reason), rejection.reason
    assert torch.equal(flat(server.replica.params), flat(others.replica.params))


def locally_trained(start: nn.Module, client: int, round_: int = 1) -> nn.Module:
    """The model as the client's training in the round leaves it."""
    model = copy.deepcopy(start)
    train(model, [], derive(data_of(client, round_).seed, "training"))
    return model


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])
