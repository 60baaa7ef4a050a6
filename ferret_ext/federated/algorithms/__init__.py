"""Federated algorithms, one a module; each knows only `base`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ferret_ext.federated import adapters
from ferret_ext.federated.algorithms.base import Algorithm
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig


def create(config: SimulationConfig, trainer: LocalTrainer) -> Algorithm[Any]:
    """The algorithm that `config.algorithm` names, around the clients' local training."""
    step, train = config.server_learning_rate, trainer.train
    makers: dict[str, Callable[[], Algorithm[Any]]] = {
        "ferret": lambda: Ferret(config.ferret, step, train),
        "fedavg": lambda: FedAvg(step, train),
        **{name: partial(FedAvg, step, train, name) for name in adapters.PUBLISHED},
    }
    return makers[config.algorithm]()
