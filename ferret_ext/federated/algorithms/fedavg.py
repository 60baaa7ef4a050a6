"""FedAvg (McMahan et al., arXiv 1602.05629): clients send their update, the server their weighted mean.

update     w_{r-1} - w_i of each trainable parameter, flat, in its dtype, as "0", "1", ...
broadcast  w_r of each trainable parameter in the same way; none in round 0

With an optimiser on the server (FedAvgM, FedAdam, ..; see `server_optimizer`):

broadcast  the mean update in the same way
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ferret_ext.federated.algorithms.base import (
    Algorithm,
    LocalData,
    Replica,
    Train,
    Values,
    check_packed,
    pack,
    trainable,
    unpack,
)
from ferret_ext.federated.algorithms.server_optimizer import ServerOptimizer
from ferret_ext.federated.algorithms.updates import ALL_RULES, Updates
from ferret_ext.federated.config import ServerConfig
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.privacy import ClientSide
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.wire import Message


@dataclass(frozen=True)
class FedAvg(Algorithm[Replica]):
    """w_r = w_{r-1} - server_learning_rate * sum_i p_i (w_{r-1} - w_i), p_i the clients' shares.

    The server sums in float32 (float64 for float64 parameters), in the order of the messages, rounds once to
    the parameters' dtype and relays the new weights, so that all parties hold the same bits.

    Where all parameters but an adapter's are frozen, only the adapter travels: `name` then says which kind.
    """

    weighting = "examples"
    self_contained = True
    rules = ALL_RULES
    server_learning_rate: float
    train: Train
    name: str = "fedavg"
    privacy: ClientSide | None = None

    def replicate(self, model: Any) -> Replica:
        return Replica(model, list(trainable(model).values()))

    def contribute(self, replica: Replica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        with watch("local"):
            loss = self.train(replica.model, data.examples, derive(data.seed, "training"), data.client)
        with watch("project"), torch.no_grad():
            pairs = zip(replica.start, replica.params, strict=True)
            deltas = (start.to(param.device) - param for start, param in pairs)
            if self.privacy is None:
                return pack(deltas), loss
            return pack(self.privacy.protect(list(deltas), data.round, data.client)), math.nan

    def check_values(self, replica: Replica, update: Message) -> None:
        check_packed(update, replica.params)

    def combine(self, replica: Replica, updates: Updates) -> Values:
        def stepped(index: int, param: Tensor) -> Tensor:
            mean = updates.average(partial(unpack, index=index, like=param))
            return (param.to(mean.dtype) - self.server_learning_rate * mean).to(param.dtype)

        with torch.no_grad():
            return pack(stepped(index, param) for index, param in enumerate(replica.params))

    def advance(self, replica: Replica, broadcast: Message) -> None:
        check_packed(broadcast, replica.params)
        with torch.no_grad():
            for index, param in enumerate(replica.params):
                param.copy_(unpack(broadcast, index, param))


@dataclass(frozen=True)
class FedOpt(FedAvg):
    """FedAvg whose server steps by an optimiser (Reddi et al., arXiv 2003.00295).

    The mean update is rounded once to the parameters' dtype and relayed, and every party makes the step: what
    the optimiser keeps follows from the broadcasts and never travels. So a client that comes late needs all
    of them, where FedAvg's needs the last.
    """

    self_contained = False
    server: ServerConfig = field(default_factory=ServerConfig, kw_only=True)

    def replicate(self, model: Any) -> Replica:
        replica = super().replicate(model)
        replica.optimizer = ServerOptimizer.on(self.server, replica.params)
        return replica

    def combine(self, replica: Replica, updates: Updates) -> Values:
        def mean(index: int, param: Tensor) -> Tensor:
            return updates.average(partial(unpack, index=index, like=param)).to(param.dtype)

        return pack(mean(index, param) for index, param in enumerate(replica.params))

    def advance(self, replica: Replica, broadcast: Message) -> None:
        check_packed(broadcast, replica.params)

        def add(tensors: list[Tensor]) -> None:
            for index, (tensor, param) in enumerate(zip(tensors, replica.params, strict=True)):
                tensor.add_(unpack(broadcast, index, param))

        assert replica.optimizer is not None, "FedAvg makes plain steps"
        replica.optimizer.step(replica.params, add, self.server_learning_rate)
