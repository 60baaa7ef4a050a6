"""A fine-tuned model from its base and a ledger: the same bits, on any machine, after any round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferret_ext.federated import adapters, algorithms, digests, journal, ledger, models
from ferret_ext.federated import config as configuration
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError, flatten
from ferret_ext.federated.wire import NO_DIGEST, Message


@dataclass(frozen=True)
class Replay:
    """A model as it stood after `round`. verified: its weights are, by their digests, those of the run."""

    model: Any
    tokenizer: Any
    round: int
    verified: bool


def replay(base: str, path: Path, round_: int | None = None, head: str | None = None) -> Replay:
    """The model after a round, by default the last, rebuilt from its base and the ledger alone.

    base: folder or hub name of the model that the run began with. path: a ledger, or a run's folder. head:
    SHA-256 of the ledger's last record, where it is known from elsewhere. Raises LedgerError, ConfigError and
    DisagreementError.
    """
    path = path / journal.LEDGER if path.is_dir() else path
    records = list(ledger.read(path, head))
    if not records:
        raise LedgerError(f"ledger: expected records in {path}, got none")
    newest = records[-1].round
    last = newest if round_ is None else round_
    if not 0 <= last <= newest:
        raise ConfigError(f"round: expected 0 to {newest}, which the ledger has, got {last}")
    config = config_of(records[0])
    model, tokenizer, server = _begin(base, config, records[0])
    for record in _needed(records[1 : last + 1], server):
        journal.replay(server, record)
    return Replay(model, tokenizer, last, records[last].weights != NO_DIGEST)


def config_of(opening: Message) -> SimulationConfig:
    """The settings that the ledger's first record holds. Raises LedgerError."""
    try:
        settings = json.loads(opening.value("config", str))
        return configuration.build(flatten(settings), required=())
    except (ConfigError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise LedgerError(f"ledger: its settings are not of this version: {error}") from None


def _begin(base: str, config: SimulationConfig, opening: Message) -> tuple[Any, Any, Server[Any]]:
    """The base model, once it is known to be the run's, with its tokenizer and a server at round 0."""
    device = models.pick_device("cpu")
    model, tokenizer = models.load(base, config.dtype, device, derive(config.seed, "model"))
    model = adapters.attach(model, config.adapter, derive(config.seed, "adapter"))
    expected, got = opening.value("base", bytes), digests.of_model(model)
    if got != expected:
        raise LedgerError(
            f"ledger: expected the base model of SHA-256 {expected.hex()}, got {got.hex()} with {base!r}"
        )
    algorithm = algorithms.create(config, LocalTrainer(config.training, tokenizer.pad_token_id))
    verify = opening.weights != NO_DIGEST
    server = Server(algorithm, model, [0], 1.0, config.seed, run=opening.run, verify_weights=verify)
    if server.broadcasts[0] != opening.value("broadcast", bytes):
        raise LedgerError("ledger: its first broadcast does not follow from its settings")
    return model, tokenizer, server


def _needed(records: Sequence[Message], server: Server[Any]) -> Sequence[Message]:
    """The records to go through: all, or the last one where it tells the whole model."""
    if not server.algorithm.self_contained or not records:
        return records
    server.skip(len(records) - 1)
    return records[-1:]
