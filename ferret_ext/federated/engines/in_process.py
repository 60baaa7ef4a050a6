"""All clients in this process, one after the other, on real bytes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ferret_ext.federated import adapters, algorithms, digests, models, scores
from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica, Reply, Weighting
from ferret_ext.federated.client import LocalTrainer, OptimizerStates
from ferret_ext.federated.config import FREE_SETTINGS, SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.evaluation import Evaluator
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.rounds import Journal, Watcher, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server


class Speaker(Protocol):
    """Takes lines of text: what was loaded, what was dropped."""

    def say(self, text: str) -> None: ...


class Narrator(Watcher, Speaker, Protocol):
    """A watcher that also takes lines of text, and who holds what."""

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
        self,
        algorithm: Algorithm[Any],
        model: Any,
        shards: Sequence[Sequence[Example]],
        weights: Sequence[float],
        seed: int,
    ) -> None:
        self._algorithm = algorithm
        self._weights = weights
        self._replica: Replica = algorithm.replicate(model)
        self._shards = shards
        self._seed = seed
        self._seen = [0] * len(shards)
        self._round = 0

    def exchange(self, watcher: Watcher, round_: int, clients: list[int], server: Server[Any]) -> list[Reply]:
        """A round of the clients: each receives the broadcasts that it has not seen and sends its update."""
        self._catch_up(round_, server)
        replies = []
        for client in clients:
            broadcasts = server.broadcasts_since(self._seen[client])
            self._seen[client] = len(server.broadcasts)
            seed = derive(self._seed, "client", round_, client)
            data = LocalData(client, round_, seed, self._shards[client], self._weights[client])
            reply = self._algorithm.client_update(self._replica, data, broadcasts)
            if reply.failure:
                watcher.client_left_out(round_, client, reply.failure)
            watcher.client_done(round_, client)
            replies.append(reply)
        return replies

    def _catch_up(self, round_: int, server: Server[Any]) -> None:
        """Before the first round of a run that is resumed: as if these clients had been there all along."""
        if self._round == 0 and round_ > 1:
            self._replica.adopt(server.replica)
        for past in range(self._round + 1, round_):
            for client in server.choose(past):
                self._seen[client] = past
        self._round = round_


OpenJournal = Callable[[Genesis, OptimizerStates], Journal]


def simulate(config: SimulationConfig, narrator: Narrator, open_journal: OpenJournal | None = None) -> Result:
    """Runs the rounds of `config`, or those that its journal lacks, and returns the final global model.

    The same config gives the same weights, bit for bit, on the same machine with the same number of threads.
    Raises ConfigError, DataError, DivergedError and RunError.
    """
    measures = scores.load(config.evaluation.scores)
    config = adapters.resolve(config)
    with reproducible(config.full_determinism, config.num_threads):
        device = models.pick_device(config.device)
        seed, allow_pickle = derive(config.seed, "model"), config.allow_pickle
        model, tokenizer = models.load(config.model, config.dtype, device, seed, allow_pickle=allow_pickle)
        full_bytes = models.trainable_bytes(model)
        model = adapters.attach(model, config.adapter, derive(config.seed, "adapter"))
        data = loading.load(
            config, tokenizer, models.max_length(model, config.dataset.max_length), narrator.say
        )
        narrator.dealt(data.holdings)
        evaluator = Evaluator(config.evaluation, data.held, tokenizer, measures)
        trainer = LocalTrainer(config.training, tokenizer.pad_token_id)
        algorithm = algorithms.create(config, trainer)
        genesis = Genesis(digests.of_model(model), ledger_text(config))
        weights = client_weights(config, algorithm, data.shards)
        clients = InProcessClients(algorithm, copy.deepcopy(model), data.shards, weights, config.seed)
        everybody = range(len(data.shards))
        server = Server(
            algorithm,
            model,
            everybody,
            config.client_fraction,
            config.seed,
            run=genesis.run,
            robust=config.robust,
            verify_weights=config.ledger.verify_weights,
            equal_weights=weighting(config, algorithm) == "uniform",
        )
        for line in (_describe(server), *algorithms.notes(config), *algorithm.notes(server.replica)):
            narrator.say(line)
        history = run_rounds(
            config.rounds,
            server,
            partial(clients.exchange, narrator),
            partial(evaluator.after_round, config.rounds),
            narrator,
            full_bytes,
            open_journal and open_journal(genesis, trainer.states),
        )
    return Result(model, tokenizer, history)


def ledger_text(config: SimulationConfig) -> str:
    """The settings as the ledger has them: without what is of this machine, or what only journals heed."""
    settings = dataclasses.asdict(config)
    for name in (*FREE_SETTINGS, "ledger", "allow_pickle"):
        del settings[name]
    names = {name: Path(settings[name]).name for name in ("model", "data")}
    return json.dumps({**settings, **names}, sort_keys=True)


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
    """What clients count by."""
    return algorithm.weighting if config.client_weights == "auto" else config.client_weights


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


def _describe(server: Server[Any]) -> str:
    size = sum(param.numel() for param in server.replica.params)
    return f"model: {size:,} trainable parameters, {models.trainable_bytes(server.replica.model):,} bytes"
