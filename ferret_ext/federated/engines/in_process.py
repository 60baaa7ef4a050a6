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

from ferret_ext.federated import algorithms, models, scores
from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica, Reply
from ferret_ext.federated.client import DivergedError, LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import formats, partition, sources
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.sources import Record
from ferret_ext.federated.data.tokens import Example, tokenise
from ferret_ext.federated.evaluation import Evaluator
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.rounds import Watcher, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server


class Speaker(Protocol):
    """Takes lines of text: what was loaded, what was dropped."""

    def say(self, text: str) -> None: ...


class Narrator(Watcher, Speaker, Protocol):
    """A watcher that also takes lines of text."""


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
    measures = scores.load(config.evaluation.scores)
    with reproducible(config.full_determinism, config.num_threads):
        device = models.pick_device(config.device)
        model, tokenizer = models.load(config.model, config.dtype, device, derive(config.seed, "model"))
        train, held = load_examples(config, tokenizer, model, narrator)
        evaluator = Evaluator(config.evaluation, held, tokenizer, measures)
        parts = partition.iid(len(train), config.num_clients, derive(config.seed, "partition"))
        trainer = LocalTrainer(config.training, tokenizer.pad_token_id)
        algorithm = algorithms.create(config, trainer.train)
        clients = InProcessClients(
            algorithm, copy.deepcopy(model), [[train[i] for i in part] for part in parts], config.seed
        )
        server = Server(algorithm, model, config.num_clients, config.client_fraction, config.seed)
        narrator.say(_describe(server))
        history = run_rounds(
            config.rounds,
            server,
            partial(clients.exchange, narrator),
            partial(evaluator.after_round, config.rounds),
            narrator,
            models.trainable_bytes(model),
        )
    return Result(model, tokenizer, history)


def load_examples(
    config: SimulationConfig, tokenizer: Any, model: Any, narrator: Speaker, with_training: bool = True
) -> tuple[list[Example], list[Example]]:
    """Training and evaluation examples, the former if asked for; says what was kept and dropped.

    Raises DataError.
    """
    dataset = config.dataset
    max_length = min(dataset.max_length, models.positions(model) or dataset.max_length)
    splits = sources.read(config.data, dataset.train_split, dataset.eval_split, dataset.config_name)
    form = formats.choose(dataset.format, dataset.prompt, dataset.response, splits.train, config.data)
    train, test = splits.train, splits.test
    if test is None:
        train, test = _hold_out(train, derive(config.seed, "hold out"))
        narrator.say(
            f"data: no {dataset.eval_split} split, {len(test)} training records are held out for evaluation"
        )

    def examples_of(split: str, records: list[Record]) -> list[Example]:
        formats.require_columns(form, records, f"{config.data} ({split})")
        examples, count = tokenise(
            records, form, tokenizer, max_length, dataset.max_prompt_length, f"{config.data} ({split})"
        )
        narrator.say(f"data: {split}: {count}")
        return examples

    held = examples_of("evaluation", test)[: config.evaluation.max_samples]
    return examples_of("training", train) if with_training else [], held


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


def _hold_out(records: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """The records without a tenth of them (at least one), and that tenth; both shuffled."""
    if len(records) < 2:
        raise DataError(
            f"data: expected at least 2 records to train on and to evaluate, found {len(records)}"
        )
    held, *rest = partition.iid(len(records), min(10, len(records)), seed)
    return [records[i] for part in rest for i in part], [records[i] for i in held]


def _describe(server: Server[Any]) -> str:
    size = sum(param.numel() for param in server.replica.params)
    return f"model: {size:,} trainable parameters, {models.trainable_bytes(server.replica.model):,} bytes"
