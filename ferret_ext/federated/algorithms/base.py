"""An algorithm: how a client turns its data into bytes, and the server turns those into the next model."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from ferret_ext.checks import KINDS
from ferret_ext.federated import wire
from ferret_ext.federated.client import LocalFailure
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.wire import Message, WireError

CONTRACT_VERSION = 1

Values = Mapping[str, wire.Value]
Weighting = Literal["uniform", "examples", "batches"]
Train = Callable[
    [Any, Sequence[Example], int, int], float
]  # model, examples, seed, client -> mean loss; changes the model


@dataclass
class Replica:
    """One party's copy of the global model, as it stands after `round`.

    params: the trainable parameters, changed in place. start: a client's copy of them as its round began.
    """

    model: Any
    params: list[Tensor]
    round: int = 0
    start: list[Tensor] = field(default_factory=list)

    @property
    def digest(self) -> bytes:
        """What all parties must agree on before they exchange numbers: names, shapes and dtypes."""
        named = trainable(self.model).items()
        text = "".join(f"{name} {list(param.shape)} {param.dtype}\n" for name, param in named)
        return hashlib.sha256(text.encode()).digest()[: wire.DIGEST_BYTES]

    @torch.no_grad()
    def mark(self) -> None:
        """Remembers the parameters as the round's start."""
        if not self.start:
            self.start = [torch.empty_like(param) for param in self.params]
        for start, param in zip(self.start, self.params, strict=True):
            start.copy_(param)

    @torch.no_grad()
    def rewind(self) -> None:
        """Goes back to the last start, if there was one, undoing the local training since."""
        if self.start:
            for param, start in zip(self.params, self.start, strict=True):
                param.copy_(start)


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True)
class LocalData:
    """What one client brings to one round. `seed` is its own for this round, `weight` its share in means."""

    client: int
    round: int
    seed: int
    examples: Sequence[Example]
    weight: float = 1.0


@dataclass(frozen=True)
class Reply:
    """What comes back from a client: the message for the server, and what was measured on the way.

    failure: why the client has nothing to send and is left out of the round; else "".
    """

    client: int
    payload: bytes
    payload_bytes_down: int
    train_loss: float
    watch: Stopwatch
    failure: str = ""


class Algorithm(ABC, Generic[R]):
    """A federated algorithm. Server and clients each hold a replica and exchange nothing but bytes.

    A broadcast is what the server relays after a round. Rebuilding applies one to a replica; server and
    clients rebuild from the same bytes, so that they hold the same weights, bit for bit.

    A subclass says how replicas are made and what the values in the messages are; what every algorithm has
    in common, that messages are of this run, of the right round and one from each client, is checked here.
    """

    name: str
    weighting: Weighting = "uniform"  # what a client counts by, as published
    self_contained: bool = False  # whether a broadcast alone tells the model, whatever came before

    @abstractmethod
    def replicate(self, model: Any) -> R:
        """A replica on `model`, at round 0."""

    @abstractmethod
    def contribute(self, replica: R, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        """Trains on the client's data; the values of its update, and the training loss."""

    @abstractmethod
    def combine(self, replica: R, updates: Sequence[Message], received: Sequence[bytes]) -> Values:
        """The values of the next round's broadcast from its updates, which are also given as received.

        The replica stays as it is. Raises WireError for an update whose values do not fit.
        """

    @abstractmethod
    def advance(self, replica: R, broadcast: Message) -> None:
        """Takes the replica from round r - 1 to r >= 1 with the values of round r's broadcast."""

    def opening(self, replica: R) -> Values:
        """The values of round 0's broadcast, which opens the run."""
        return {}

    def begin(self, replica: R, broadcast: Message) -> None:
        """Takes in round 0's broadcast; a replica may see it more than once."""

    def notes(self, replica: R) -> list[str]:
        """Lines for the log, before the first round: what its user should know about the settings."""
        return []

    def open(self, replica: R) -> bytes:
        """Round 0's broadcast."""
        return self._broadcast(replica, 0, self.opening(replica))

    def rebuild(self, replica: R, broadcast: bytes) -> None:
        """Takes the replica from round r - 1 to r with round r's broadcast; does nothing if it is there.

        From any earlier round, where broadcasts are self-contained.
        """
        message = wire.decode(broadcast)
        check(self.name, "broadcast", "algorithm", self.name, message.algorithm)
        check(self.name, "broadcast", "kind", "broadcast", message.kind)
        if message.round <= replica.round and replica.round > 0:
            return  # applied before
        if message.round > 0 and not self.self_contained:
            check(self.name, "broadcast", "round", replica.round + 1, message.round)
        check(self.name, "broadcast", "digest", replica.digest.hex(), message.digest.hex())
        if message.round == 0:
            self.begin(replica, message)
        else:
            self.advance(replica, message)
            replica.round = message.round

    def train_and_encode(self, replica: R, data: LocalData, watch: Stopwatch) -> tuple[bytes, float]:
        """Trains on the client's data and encodes the update; also the training loss."""
        digest = replica.digest
        values, loss = self.contribute(replica, data, watch)
        update = Message(self.name, "update", digest, data.round, data.client, data.weight, values)
        return wire.encode(update), loss

    def aggregate(self, replica: R, updates: Sequence[bytes]) -> bytes:
        """The next round's broadcast from its clients' messages, once checked; the replica stays as it is."""
        round_ = replica.round + 1
        messages = [wire.decode(update) for update in updates]
        clients = [message.client for message in messages]
        if not clients or len(set(clients)) < len(clients):
            raise WireError(
                f"{self.name}: round {round_} must have one update from each client, got them from {clients}"
            )
        digest = replica.digest
        for message in messages:
            self.check_update(message, digest, round_)
        return self._broadcast(replica, round_, self.combine(replica, messages, updates))

    def check_update(self, message: Message, digest: bytes, round_: int) -> None:
        """Raises WireError unless the message is an update of this algorithm, digest and round."""
        sender = f"client {message.client}'s update"
        check(self.name, sender, "algorithm", self.name, message.algorithm)
        check(self.name, sender, "kind", "update", message.kind)
        check(self.name, sender, "round", round_, message.round)
        check(self.name, sender, "digest", digest.hex(), message.digest.hex())

    def client_update(self, replica: R, data: LocalData, broadcasts: Sequence[bytes]) -> Reply:
        """A client's part of a round: rebuild the global model from what the server relays, train, encode.

        Training that fails, or gives an update that is not finite, is told in the reply and not raised.
        """
        watch = Stopwatch()
        with watch("rebuild"):
            replica.rewind()
            for broadcast in broadcasts:
                self.rebuild(replica, broadcast)
            replica.mark()
        received = sum(map(len, broadcasts))
        try:
            payload, loss = self.train_and_encode(replica, data, watch)
        except (LocalFailure, wire.NotFiniteError) as failure:
            return Reply(data.client, b"", received, math.nan, watch, str(failure))
        return Reply(data.client, payload, received, loss, watch)

    def server_apply(self, replica: R, updates: Sequence[bytes]) -> bytes:
        """The server's part of a round: w_r from the clients' messages; returns the broadcast."""
        broadcast = self.aggregate(replica, updates)
        self.rebuild(replica, broadcast)
        return broadcast

    def _broadcast(self, replica: R, round_: int, values: Values) -> bytes:
        return wire.encode(Message(self.name, "broadcast", replica.digest, round_, values=values))


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; tied ones once, frozen and empty ones not at all."""
    named = model.named_parameters()
    return {name: param for name, param in named if param.requires_grad and param.numel() > 0}


def pack(tensors: Iterable[Tensor]) -> Values:
    """Tensors as flat arrays "0", "1", ... in their own dtypes."""

    def array(tensor: Tensor) -> wire.Array:
        flat = tensor.detach().reshape(-1).cpu()
        if flat.dtype == torch.bfloat16:
            return flat.view(torch.uint16).numpy().view(wire.BFLOAT16)
        return flat.numpy()

    return {str(index): array(tensor) for index, tensor in enumerate(tensors)}


def unpack(message: Message, like: Sequence[Tensor]) -> list[Tensor]:
    """What `pack` made, in the shapes and on the devices of `like`; WireError for anything else."""

    def tensor(name: str, model: Tensor) -> Tensor:
        half = model.dtype == torch.bfloat16
        dtype = wire.BFLOAT16 if half else torch.empty(0, dtype=model.dtype).numpy().dtype
        array = message.array(name, dtype, (model.numel(),))
        flat = torch.from_numpy(array.view("<u2")).view(torch.bfloat16) if half else torch.from_numpy(array)
        return flat.view(model.shape).to(model.device)

    if len(message.values) != len(like):
        raise WireError(f"{message.algorithm}: expected {len(like)} tensors, got {len(message.values)}")
    return [tensor(str(index), model) for index, model in enumerate(like)]


def shares(updates: Sequence[Message]) -> list[float]:
    """The updates' weights, divided by their exact sum."""
    total = math.fsum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def stream_contract(basis: str) -> int:
    """The number that stands in messages for the version of docs/streams.md and the kind of basis."""
    return CONTRACT_VERSION << 16 | KINDS[basis]


def check(name: str, what: str, field: str, expected: object, got: object) -> None:
    """Raises WireError, in the algorithm's name, where the two differ."""
    if expected != got:
        raise WireError(f"{name}: {what} must have {field} {expected}, got {got}")
