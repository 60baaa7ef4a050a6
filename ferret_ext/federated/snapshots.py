"""What a replica held after a round, and clients' optimisers, in files of safetensors beside the ledger."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ferret_ext.federated import digests, files, wire
from ferret_ext.federated.algorithms.base import Values
from ferret_ext.federated.client import OptimizerStates
from ferret_ext.federated.config import LedgerConfig
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.metrics import Outcome
from ferret_ext.federated.server import Server
from ferret_ext.federated.wire import Message, WireError

_STATE = "state of the run"  # of a snapshot's tensors, the one that holds a message's bytes


@dataclass(frozen=True)
class Snapshot:
    """What the replica held after a round (see `base.Replica.held`), and its state as a message."""

    round: int
    held: list[Tensor]
    state: Message

    def fits(self, record: Message) -> bool:
        """Whether this is of the record's round, to the bit."""
        ours, theirs = self.state, record
        same = (ours.run, ours.round, ours.digest) == (theirs.run, theirs.round, theirs.digest)
        expected = {ours.weights, theirs.weights} - {wire.NO_DIGEST}
        return same and expected == {digests.together(digests.of_each(self.held))}


class Snapshots:
    """The newest snapshots of a run, one a file."""

    def __init__(self, folder: Path, config: LedgerConfig) -> None:
        self._folder = folder
        self._config = config

    def save(self, server: Server[Any]) -> None:
        """Adds a snapshot if one is due, and removes those that are too many.

        Where a broadcast tells the whole model, the ledger has what a snapshot would hold.
        """
        replica, every = server.replica, self._config.snapshot_every
        if server.algorithm.self_contained or every == 0 or replica.round % every:
            return
        tensors = [tensor.detach().contiguous() for tensor in replica.held]
        weights = digests.together(digests.of_each(tensors))
        state = dataclasses.replace(message_of(server, dict(replica.state())), weights=weights)
        encoded = torch.frombuffer(bytearray(wire.encode(state)), dtype=torch.uint8)
        named = {_STATE: encoded, **{str(index): tensor for index, tensor in enumerate(tensors)}}
        self._folder.mkdir(exist_ok=True)
        files.replace(self._path(replica.round), lambda path: save_file(named, path))
        for round_ in self._rounds()[self._config.keep_snapshots :]:
            self._path(round_).unlink()

    def newest(self, server: Server[Any], limit: int) -> Iterator[Snapshot]:
        """Snapshots of rounds up to `limit`, the newest first, as far as they can be read."""
        for round_ in self._rounds():
            if round_ > limit:
                continue
            try:
                tensors = load_file(self._path(round_))
                state = wire.decode(tensors.pop(_STATE).numpy().tobytes())
                held = [tensors[str(index)] for index in range(len(server.replica.held))]
            except (OSError, SafetensorError, KeyError, WireError):
                continue
            pairs = zip(held, server.replica.held, strict=True)
            if all((ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) for ours, theirs in pairs):
                yield Snapshot(round_, held, state)

    def _rounds(self) -> list[int]:
        """The rounds that there are snapshots of, the newest first."""
        return sorted(
            (found[0] for _, found in _numbered(self._folder, "round-{}.safetensors")), reverse=True
        )

    def _path(self, round_: int) -> Path:
        return self._folder / f"round-{round_}.safetensors"


# ---- optimisers ----


class Optimizers:
    """What clients keep of their optimisers, a file for each client and round; an empty one: nothing."""

    def __init__(self, folder: Path, states: OptimizerStates) -> None:
        self._folder = folder
        self._states = states
        self._saved = False

    def save(self, outcome: Outcome) -> None:
        """Writes the states of the round's clients beside those of former rounds."""
        self._saved = self._saved or any(client in self._states for client in outcome.clients)
        if not self._saved:
            return
        self._folder.mkdir(exist_ok=True)
        for client in outcome.clients:
            tensors = {
                f"{index}.{name}": value.contiguous()
                for index, values in self._states.get(client, {}).items()
                for name, value in values.items()
                if isinstance(value, Tensor)
            }
            files.replace(self._path(client, outcome.round), partial(save_file, tensors))

    def prune(self, outcome: Outcome) -> None:
        """Removes what the round's clients kept from former rounds, once this one counts."""
        for path, (client, round_) in self._files():
            if client in outcome.clients and round_ < outcome.round:
                path.unlink()

    def load(self, newest: int) -> None:
        """Takes back each client's newest state of the rounds that count. Raises LedgerError."""
        found: dict[int, tuple[int, Path]] = {}
        for path, (client, round_) in self._files():
            if round_ <= newest:
                found[client] = max(found.get(client, (0, path)), (round_, path))
        for client, (_, path) in found.items():
            try:
                state = _nested(load_file(path))
            except (OSError, SafetensorError, ValueError) as error:
                raise LedgerError(f"ledger: {path} cannot be read: {error}") from None
            if state:
                self._states[client] = state
        self._saved = bool(found)

    def _files(self) -> list[tuple[Path, list[int]]]:
        return list(_numbered(self._folder, "client-{}-round-{}.safetensors"))

    def _path(self, client: int, round_: int) -> Path:
        return self._folder / f"client-{client}-round-{round_}.safetensors"


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return state


def _numbered(folder: Path, pattern: str) -> Iterator[tuple[Path, list[int]]]:
    """The folder's files of this name, with the numbers that stand for {}."""
    wanted = re.compile(re.escape(pattern).replace(r"\{\}", "([0-9]+)"))
    for path in folder.iterdir() if folder.is_dir() else ():
        if found := wanted.fullmatch(path.name):
            yield path, [int(number) for number in found.groups()]


def message_of(server: Server[Any], values: Values) -> Message:
    """A message of kind "record" about the round that the server has come to."""
    replica = server.replica
    return Message(
        server.algorithm.name,
        "record",
        replica.digest,
        replica.round,
        values=values,
        run=replica.run,
        weights=replica.weights,
    )
