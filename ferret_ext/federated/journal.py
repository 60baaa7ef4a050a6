"""What a run writes down as it goes, in its folder, and how it goes on from there.

    ledger, ledger.head                         the rounds that count, see `ledger`
    snapshots/round-R.safetensors               the weights after round R, and what else the next one needs
    optimizers/client-C-round-R.safetensors     of clients that keep their optimiser's state between rounds
    draws.key                                   by which clients are drawn where nobody may learn who is
    pending.json                                the seconds of the newest round, until it is evaluated

The ledger alone says what the model is. A snapshot only saves time: one that is missing or damaged is passed
over. All files are whole or not there, and none replaces another before the round counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from ferret_ext.federated import files, ledger, wire
from ferret_ext.federated.algorithms.base import Values
from ferret_ext.federated.client import OptimizerStates
from ferret_ext.federated.config import LedgerConfig
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.ledger import Ledger
from ferret_ext.federated.metrics import Outcome, Rejection, RoundMetrics
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import Setting, flatten
from ferret_ext.federated.snapshots import Optimizers, Snapshots, message_of
from ferret_ext.federated.wire import Message, WireError

LEDGER = "ledger"
HEAD = LEDGER + ledger.HEAD_SUFFIX
PENDING = "pending.json"
KEY = "draws.key"
KEY_BITS = 128
FILES = (HEAD, LEDGER, PENDING, KEY, "snapshots", "optimizers")


@dataclass(frozen=True)
class Genesis:
    """What a run is: the digest of its base model (`digests.of_model`), and its settings as JSON."""

    base: bytes
    config: str

    @property
    def run(self) -> bytes:
        """8 bytes that name the run. Equal runs have equal names, so that they leave equal ledgers."""
        return hashlib.sha256(self.base + self.config.encode()).digest()[: wire.DIGEST_BYTES]


class FolderJournal:
    """A run's journal in a folder. states: of the clients' optimisers, see `client.LocalTrainer`."""

    def __init__(
        self,
        folder: Path,
        genesis: Genesis,
        config: LedgerConfig,
        states: OptimizerStates,
        measured: Sequence[RoundMetrics] | None = None,
    ) -> None:
        """measured: of a run that goes on, the rounds that need no measuring; None: it begins anew."""
        self.measured = list(measured or ())
        self._resumed = measured is not None
        self._folder = folder
        self._genesis = genesis
        self._snapshots = Snapshots(folder / "snapshots", config)
        self._optimizers = Optimizers(folder / "optimizers", states)
        self._ledger: Ledger | None = None
        self._key: int | None = None

    def key(self) -> int:
        """See `rounds.Journal`. Raises LedgerError."""
        if self._key is None:
            self._key = read_key(self._folder / KEY) if self._resumed else secrets.randbits(KEY_BITS)
        return self._key

    def replay(self, server: Server[Any]) -> Iterator[Outcome]:
        """See `rounds.Journal`. A run that begins anew has its ledger once round 0 is measured.

        Raises LedgerError, also where the ledger is another run's, and DisagreementError where its weights
        cannot be rebuilt to the bit.
        """
        path = self._folder / LEDGER
        if not self._resumed:
            yield Outcome(0)
            with _writing(self._folder):
                if self._key is not None:
                    write_key(self._folder / KEY, self._key)
                self._ledger = Ledger.create(path)
                self._ledger.append(opening_record(server, self._genesis))
            return
        self._ledger = Ledger.open(path)
        self._check_run(self._ledger[0], server)
        if not self.measured:
            yield Outcome(0)
        for round_ in range(self._skip(server, self._ledger), len(self._ledger)):
            record = self._ledger[round_]
            replay(server, record)
            self._release(server, round_ - 1)
            if round_ >= len(self.measured):
                yield self._with_seconds(outcome_of(record))
        self._optimizers.load(len(self._ledger) - 1)

    def commit(self, server: Server[Any], outcome: Outcome) -> None:
        """See `rounds.Journal`. Raises LedgerError."""
        assert self._ledger is not None, "commit before replay"
        with _writing(self._folder):
            self._optimizers.save(outcome)
            self._write_seconds(outcome)
            self._ledger.append(record_of(server, outcome))
            self._release(server, outcome.round - 1)
            self._optimizers.prune(outcome)
            self._snapshots.save(server)

    def _check_run(self, opening: Message, server: Server[Any]) -> None:
        base, config = opening.value("base", bytes), opening.value("config", str)
        begun = f"ledger: expected the run that {self._folder} holds"
        if base != self._genesis.base:
            raise LedgerError(
                f"ledger: expected the base model of SHA-256 {base.hex()}, got {self._genesis.base.hex()}"
            )
        if config != self._genesis.config:
            saved, wanted = flatten(_object(config)), flatten(_object(self._genesis.config))
            raise LedgerError(other_settings(self._folder, saved, wanted) or f"{begun}, got other settings")
        if opening.value("broadcast", bytes) != server.broadcasts[0]:
            raise LedgerError(f"{begun}, got another first broadcast")

    def _release(self, server: Server[Any], round_: int) -> None:
        """Has the server read a former round's broadcast from the ledger, should a client come late."""
        assert self._ledger is not None, "release before replay"
        server.release(round_, partial(self._ledger.broadcast, round_))

    def _skip(self, server: Server[Any], records: Ledger) -> int:
        """Jumps over rounds that need no measuring, as far as can be; the first round to go through."""
        newest, measured = len(records) - 1, len(self.measured)
        if server.algorithm.self_contained:
            first = max(1, min(measured, newest))
            server.skip(first - 1)
            return first
        for snapshot in self._snapshots.newest(server, limit=min(measured - 1, newest)):
            if snapshot.fits(records[snapshot.round]):
                for round_ in range(1, snapshot.round + 1):
                    with _reading(f"record {round_}"):
                        server.recall(records.broadcast(round_))
                    self._release(server, round_ - 1)
                with _reading(f"snapshot of round {snapshot.round}"):
                    server.restore(snapshot.held, snapshot.state, records[snapshot.round].weights)
                return snapshot.round + 1
        return 1

    def _write_seconds(self, outcome: Outcome) -> None:
        text = json.dumps({"round": outcome.round, **outcome.seconds})
        files.replace(self._folder / PENDING, lambda path: path.write_text(text + "\n", "utf-8"))

    def _with_seconds(self, outcome: Outcome) -> Outcome:
        try:
            said = json.loads((self._folder / PENDING).read_text("utf-8"))
            seconds = {name: float(said[name]) for name in outcome.seconds if said["round"] == outcome.round}
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return outcome
        return dataclasses.replace(outcome, **seconds)  # type: ignore[arg-type]


def other_settings(folder: Path, saved: Iterable[Setting], wanted: Iterable[Setting]) -> str:
    """The first setting in which a run to go on with differs from the one that its folder holds, and what
    helps; "" if there is none."""
    theirs = dict(saved)
    for key, value in wanted:
        if theirs.get(key) != (list(value) if isinstance(value, tuple) else value):
            return (
                f"{key}: expected {theirs.get(key)!r}, as in the run that {str(folder)!r} has part of, got "
                f"{value!r}; a run is resumed with its own settings (--config)"
            )
    return ""


def _object(text: str) -> dict[str, Any]:
    """What JSON says, if that is settings; a ledger's may be anything."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


# ---- records ----


def opening_record(server: Server[Any], genesis: Genesis) -> Message:
    """Round 0's record."""
    (opening,) = server.broadcasts_since(0)
    values: Values = {"broadcast": opening, "base": genesis.base, "config": genesis.config}
    return message_of(server, values)


def record_of(server: Server[Any], outcome: Outcome) -> Message:
    """The record of the round that the server has come to."""
    (newest,) = server.broadcasts_since(outcome.round)
    outcome = outcome.untold if server.draws.secret else outcome
    values: dict[str, wire.Value] = {
        "broadcast": newest,
        **{name: np.array(getattr(outcome, name), np.uint32) for name in ("clients", "left_out", "accepted")},
        "rejected": np.array([rejection.client for rejection in outcome.rejected], np.uint32),
        "reasons": [rejection.reason.encode() for rejection in outcome.rejected],
        "updates": outcome.updates,
        "bytes_up": outcome.payload_bytes_up,
        "bytes_down": outcome.payload_bytes_down,
    }
    optional = {name: getattr(outcome, name) for name in ledger.OPTIONAL}
    values |= {name: value for name, value in optional.items() if value is not None}
    return message_of(server, values)


def outcome_of(record: Message) -> Outcome:
    """What a record says came of its round. Raises LedgerError."""
    try:
        rejected, reasons = _numbers(record, "rejected"), record.value("reasons", list)
        return Outcome(
            round=record.round,
            clients=_numbers(record, "clients"),
            left_out=_numbers(record, "left_out"),
            accepted=_numbers(record, "accepted"),
            rejected=[Rejection(c, reason.decode()) for c, reason in zip(rejected, reasons, strict=True)],
            updates=record.value("updates", list),
            payload_bytes_up=record.value("bytes_up", int),
            payload_bytes_down=record.value("bytes_down", int),
            **{
                name: record.value(name, float)  # type: ignore[arg-type]
                for name in ledger.OPTIONAL
                if name in record.values
            },
        )
    except ValueError as error:
        raise LedgerError(f"ledger: record {record.round}: {error}") from None


def replay(server: Server[Any], record: Message) -> None:
    """Takes the server through the record's round. Raises LedgerError and DisagreementError."""
    with _reading(f"record {record.round}"):
        server.replay(record.value("broadcast", bytes))
    replica = server.replica
    if (replica.round, replica.weights) != (record.round, record.weights):
        raise LedgerError(f"ledger: record {record.round} must have the broadcast of its own round")


def write_key(path: Path, key: int) -> None:
    """Into a file that nobody else on the machine can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{key:032x}\n")
        file.flush()
        os.fsync(file.fileno())


def read_key(path: Path) -> int:
    """Raises LedgerError."""
    try:
        return int(path.read_text("ascii"), 16)
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"ledger: {path} is needed to go on, for it says which clients are drawn: {error}"
        ) from None


def _numbers(record: Message, name: str) -> list[int]:
    count = record.value(name, np.ndarray).size
    numbers: list[int] = record.array(name, "<u4", (count,)).tolist()
    return numbers


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except WireError as error:
        raise LedgerError(f"ledger: {what}: {error}") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LedgerError(
            f"ledger: {folder} cannot be written: {error}; the rounds before are safe, ferret resume goes on"
        ) from None
