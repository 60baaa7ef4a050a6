"""All clients in this process, one after the other, on real bytes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ferret_ext.federated import algorithms, models
from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica, Reply
from ferret_ext.federated.client import DivergedError, LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.metrics import RoundMetrics, evaluation_loss
from ferret_ext.federated.rounds import Watcher, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server


class Narrator(Watcher, Protocol):
    """A watcher that also takes lines of text, what was loaded and dropped, and who holds what."""

    def say(self, text: str) -> None: ...

    def dealt(self, holdings: Holdings) -> None: ...


@dataclass(frozen=True)
class Result:
    """A finished run: the global model with its tokenizer, and the metrics of each round."""

    model: Any
    tokenizer: Any
    history: list[RoundMetrics]


class InProcessClients:
    """The clients of a run.

    All clients hold the same weights once they have rebuilt, so they share one replica: its model is what the
    client whose turn it is trains, and its start is what the next one goes back to. Those weights come from
    the relayed bytes and from nowhere else; the server's model is another one.
    """

    def __init__(
        self, algorithm: Algorithm[Any], model: Any, shards: Sequence[Sequence[Example]], seed: int
    ) -> None:
        self._algorithm = algorithm
        self._replica: Replica = algorithm.replicate(model)
        self._shards = shards
        self._seed = seed
        self._seen = [0] * len(shards)

    def exchange(self, watcher: Watcher, round_: int, clients: list[int], server: Server[Any]) -> list[Reply]:
        """A round of the clients: each receives the broadcasts that it has not seen and sends its update."""
        replies = []
        for client in clients:
            broadcasts = server.broadcasts_since(self._seen[client])
            self._seen[client] = len(server.broadcasts)
            data = LocalData(
                client, round_, derive(self._seed, "client", round_, client), self._shards[client]
            )
            try:
                replies.append(self._algorithm.client_update(self._replica, data, broadcasts))
            except DivergedError as error:
                raise DivergedError(f"client {client} in round {round_}: {error}") from None
            watcher.client_done(round_, client)
        return replies


def simulate(config: SimulationConfig, narrator: Narrator) -> Result:
    """Runs the rounds of `config` and returns the final global model.

    The same config gives the same weights, bit for bit, on the same machine with the same number of threads.
    Raises ConfigError, DataError and DivergedError.
    """
    with reproducible(config.full_determinism, config.num_threads):
        device = models.pick_device(config.device)
        model, tokenizer = models.load(config.model, config.dtype, device, derive(config.seed, "model"))
        data = loading.load(config, tokenizer, _max_length(config, model), narrator.say)
        narrator.dealt(data.holdings)
        trainer = LocalTrainer(config.training, tokenizer.pad_token_id)
        algorithm = algorithms.create(config, trainer.train)
        clients = InProcessClients(algorithm, copy.deepcopy(model), data.shards, config.seed)
        server = Server(algorithm, model, len(data.shards), config.client_fraction, config.seed)
        narrator.say(_describe(server))
        batch_size = config.evaluation.per_device_eval_batch_size
        history = run_rounds(
            config.rounds,
            server,
            partial(clients.exchange, narrator),
            partial(
                evaluation_loss,
                examples=data.held,
                batch_size=batch_size,
                pad_token_id=tokenizer.pad_token_id,
            ),
            narrator,
            models.trainable_bytes(model),
        )
    return Result(model, tokenizer, history)


@contextmanager
def reproducible(deterministic: bool, num_threads: int | None) -> Iterator[None]:
    """Deterministic kernels only, if so asked, and this many CPU threads; the former settings afterwards."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(num_threads or threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.set_num_threads(threads)


def _max_length(config: SimulationConfig, model: Any) -> int:
    """The configured length, or the model's positions where these are fewer."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return min(config.dataset.max_length, positions or config.dataset.max_length)


def _describe(server: Server[Any]) -> str:
    size = sum(param.numel() for param in server.replica.params)
    return f"model: {size:,} trainable parameters, {models.trainable_bytes(server.replica.model):,} bytes"
