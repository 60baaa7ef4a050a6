"""A run from its settings to its last round: what its parties begin with, and what its server does."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ferret_ext.federated import accounting, adapters, algorithms, compatibility, digests, models
from ferret_ext.federated.algorithms.base import Algorithm
from ferret_ext.federated.client import LocalTrainer, OptimizerStates
from ferret_ext.federated.config import FREE_SETTINGS, SimulationConfig
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.dialogue import Ask
from ferret_ext.federated.draws import Draws, SecretDraws
from ferret_ext.federated.evaluation import Evaluator
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.members import weighting
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.rounds import Exchange, Journal, NoJournal, Watcher, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server

if TYPE_CHECKING:
    from ferret_ext.federated.ranks import Ranks

# Of this machine, or of how messages are carried and kept: no part of what a run is.
NOT_IN_LEDGER = (*FREE_SETTINGS, "ledger", "allow_pickle")


class Speaker(Protocol):
    """Takes lines of text: what was loaded, what was dropped."""

    def say(self, text: str) -> None: ...


class Narrator(Watcher, Speaker, Protocol):
    """A watcher that also takes lines of text, and who holds what."""

    def dealt(self, holdings: Holdings) -> None: ...


OpenJournal = Callable[[Genesis, OptimizerStates], Journal]


@dataclass(frozen=True)
class Result:
    """A finished run: the global model with its tokenizer, and the metrics of each round."""

    model: Any
    tokenizer: Any
    history: list[RoundMetrics]


@dataclass(frozen=True)
class Start:
    """What every party of a run begins with, clients and server alike.

    config: with its algorithm's adapter and optimiser. model_bytes: of the trainable parameters of the model
    without adapters. max_length: tokens of an example.
    """

    config: SimulationConfig
    model: Any
    tokenizer: Any
    model_bytes: int
    max_length: int
    trainer: LocalTrainer
    algorithm: Algorithm[Any]
    genesis: Genesis


def begin(config: SimulationConfig, settings: str | None = None, ranks: Ranks | None = None) -> Start:
    """Loads the model and makes the algorithm. settings: those of the run as its ledger has them, where they
    come from elsewhere. ranks: the processes that the model is cut over. Raises ConfigError."""
    config = accounting.resolve(adapters.resolve(config))
    if ranks:
        ranks.check(config)
    device, seed = models.pick_device("cpu" if ranks else config.device), derive(config.seed, "model")
    with ranks.turn() if ranks else nullcontext():
        model, tokenizer = models.load(
            config.model, config.dtype, device, seed, allow_pickle=config.allow_pickle
        )
        model_bytes = models.trainable_bytes(model)
        model = adapters.attach(model, config.adapter, derive(config.seed, "adapter"))
        genesis = Genesis(digests.of_model(model), settings or ledger_text(config))
        if ranks:
            ranks.cut(model)
    trainer = (ranks.trainer if ranks else LocalTrainer)(config.training, tokenizer.pad_token_id)
    return Start(
        config,
        model,
        tokenizer,
        model_bytes,
        models.max_length(model, config.dataset.max_length),
        trainer,
        algorithms.create(config, trainer),
        genesis,
    )


def lead(
    start: Start,
    clients: int,
    exchange: Exchange,
    ask: Ask,
    evaluator: Evaluator,
    narrator: Narrator,
    open_journal: OpenJournal | None = None,
) -> Result:
    """The server's side of a run of so many clients: all rounds, or those that its journal lacks.

    Raises ConfigError, DivergedError and RunError.
    """
    config = start.config
    compatibility.check_quorum(config, clients)
    journal = open_journal(start.genesis, start.trainer.states) if open_journal else NoJournal()
    accountant = accounting.of(config, clients)
    rounds = accountant.affordable() if accountant else config.rounds
    server = Server(
        start.algorithm,
        start.model,
        range(clients),
        config.client_fraction,
        config.seed,
        run=start.genesis.run,
        robust=config.robust,
        verify_weights=config.ledger.verify_weights,
        equal_weights=weighting(config, start.algorithm) == "uniform",
        over_selection=config.federation.over_selection,
        privacy=config.privacy,
        draws=_secret_draws(config, clients, journal) if config.privacy.sampling == "secret" else None,
    )
    notes = (*algorithms.notes(config), *start.algorithm.notes(server.replica))
    for line in (_describe(server), *notes, *(accountant.notes(rounds) if accountant else ())):
        narrator.say(line)
    history = run_rounds(
        rounds,
        server,
        exchange,
        partial(evaluator.after_round, rounds),
        narrator,
        start.model_bytes,
        journal,
        ask,
        accountant.spent if accountant else None,
    )
    return Result(start.model, start.tokenizer, history)


def ledger_text(config: SimulationConfig) -> str:
    """The settings as the ledger has them: without what is of this machine, or what only journals heed."""
    settings = dataclasses.asdict(config)
    for name in NOT_IN_LEDGER:
        del settings[name]
    names = {name: Path(settings[name]).name for name in ("model", "data")}
    return json.dumps({**settings, **names}, sort_keys=True)


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


def _secret_draws(config: SimulationConfig, clients: int, journal: Journal) -> Draws:
    seed = config.privacy.noise_seed
    key = journal.key() if seed is None else derive(seed, "coins")
    return SecretDraws(range(clients), config.client_fraction, key)


def _describe(server: Server[Any]) -> str:
    size = sum(param.numel() for param in server.replica.params)
    return f"model: {size:,} trainable parameters, {models.trainable_bytes(server.replica.model):,} bytes"
