"""An algorithm: how a client turns its data into bytes, and the server turns those into the next model."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ferret_ext.checks import KINDS
from ferret_ext.federated import digests, wire
from ferret_ext.federated.algorithms.server_optimizer import ServerOptimizer
from ferret_ext.federated.algorithms.updates import Rule, Updates
from ferret_ext.federated.client import LocalFailure
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.dialogue import Assembly, Dialogue
from ferret_ext.federated.errors import DisagreementError
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.wire import Message, WireError

if TYPE_CHECKING:
    from ferret_ext.federated.secure.participant import Participant

CONTRACT_VERSION = 1
LARGEST_WEIGHT = 2.0**64  # sums of weights stay far from overflow

Values = Mapping[str, wire.Value]
Weighting = Literal["uniform", "examples", "batches"]
Train = Callable[
    [Any, Sequence[Example], int, int], float
]  # model, examples, seed, client -> mean loss; changes the model


@dataclass
class Replica:
    """One party's copy of the global model, as it stands after `round`.

    params: the trainable parameters, changed in place. start: a client's copy of them as its round began, in
    host memory with `start_on_host`. run: names the run; a client learns it from round 0's broadcast.
    weights: the digest of what is `held` after `round`, zeros where nobody compares it. marked: the round
    whose parameters are the start. optimizer: the server's, which every party keeps; None where its step is
    plain. cut: the parameters where FSDP2 has cut them over several ranks, and `params` are this one's parts.
    """

    model: Any
    params: list[Tensor]
    round: int = 0
    start: list[Tensor] = field(default_factory=list)
    start_on_host: bool = False
    run: bytes = wire.NO_DIGEST
    weights: bytes = wire.NO_DIGEST
    marked: int = -1
    optimizer: ServerOptimizer | None = None
    cut: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from ferret_ext import fsdp  # takes a second to import

            if any(map(fsdp.is_cut, self.params)):
                self.cut, self.params = self.params, fsdp.local(self.params)

    @property
    def digest(self) -> bytes:
        """What all parties must agree on before they exchange numbers: names, shapes, dtypes, settings."""
        return self.shapes if self.optimizer is None else self.optimizer.agreed(self.shapes)

    @property
    def shapes(self) -> bytes:
        """A digest of names, shapes and dtypes."""
        named = trainable(self.model).items()
        text = "".join(f"{name} {list(param.shape)} {param.dtype}\n" for name, param in named)
        return hashlib.sha256(text.encode()).digest()[: wire.DIGEST_BYTES]

    @property
    def held(self) -> list[Tensor]:
        """What all parties hold alike: the parameters, and what the server's optimiser keeps."""
        return [*self.params, *(self.optimizer.moments if self.optimizer else ())]

    @property
    def names(self) -> list[str]:
        """Of what is `held`."""
        names = list(trainable(self.model))
        return [*names, *(self.optimizer.names(names) if self.optimizer else ())]

    def digests(self) -> list[bytes]:
        """Of each of what is `held`, as a whole."""
        return digests.of_each_cut(self.cut) if self.cut else digests.of_each(self.held)

    @torch.no_grad()
    def mark(self) -> None:
        """Remembers the parameters as the round's start."""
        if not self.start:
            self.start = [self._room_for(param) for param in self.params]
        for start, param in zip(self.start, self.params, strict=True):
            start.copy_(param)
        self.marked = self.round

    def _room_for(self, param: Tensor) -> Tensor:
        if self.start_on_host and param.is_cuda:
            return torch.empty_like(param, device="cpu", pin_memory=True)
        return torch.empty_like(param)

    @torch.no_grad()
    def rewind(self) -> None:
        """Goes back to the round's start, if that was marked, undoing the local training since."""
        if self.marked == self.round:
            for param, start in zip(self.params, self.start, strict=True):
                param.copy_(start)

    @torch.no_grad()
    def adopt(self, other: Replica) -> None:
        """Takes over another replica's weights, and all else that the next round depends on."""
        self.resume(Message("", "record", other.digest, other.round, values=other.state()))
        for ours, theirs in zip(self.held, other.held, strict=True):
            ours.copy_(theirs)
        self.round, self.run, self.weights = other.round, other.run, other.weights

    def state(self) -> Values:
        """What the next round depends on besides the weights, as values for a message."""
        return {}

    def resume(self, state: Message) -> None:
        """Takes back what `state` gave; WireError for anything else."""


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True)
class LocalData:
    """What one client brings to one round. `seed` is its own for this round, `weight` its share in means,
    `participant` what masks its update, if anything does, among those that the `invitation` names."""

    client: int
    round: int
    seed: int
    examples: Sequence[Example]
    weight: float = 1.0
    participant: Participant | None = None
    invitation: bytes = b""


@dataclass(frozen=True)
class Reply:
    """What comes back from a client: the message for the server, and what was measured on the way.

    failure: why the client has nothing to send and is left out of the round; else "". late: it belongs to a
    round that is over, and counts for nothing.
    """

    client: int
    payload: bytes
    payload_bytes_down: int
    train_loss: float
    watch: Stopwatch
    failure: str = ""
    late: bool = False


class Algorithm(ABC, Generic[R]):
    """A federated algorithm. Server and clients each hold a replica and exchange nothing but bytes.

    A broadcast is what the server relays after a round. Server and clients go on by the same values, so that
    they hold the same weights, bit for bit.

    A subclass says how replicas are made and what the values in the messages are; what every algorithm has
    in common, that messages are of this run and of the right round, is checked here.
    """

    name: str
    weighting: Weighting = "uniform"  # what a client counts by, as published
    self_contained: bool = False  # whether a broadcast alone tells the model, whatever came before
    rules: tuple[Rule, ...] = ("mean", "norm-clip")  # how updates can be added up

    @abstractmethod
    def replicate(self, model: Any) -> R:
        """A replica on `model`, at round 0."""

    @abstractmethod
    def contribute(self, replica: R, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        """Trains on the client's data; the values of its update, and the training loss."""

    @abstractmethod
    def check_values(self, replica: R, update: Message) -> None:
        """Raises WireError for an update whose values do not fit."""

    @abstractmethod
    def combine(self, replica: R, updates: Updates) -> Values:
        """The values of the next round's broadcast from updates that were checked; the replica stays."""

    @abstractmethod
    def advance(self, replica: R, broadcast: Message) -> None:
        """Takes the replica from round r - 1 to r >= 1 with the values of round r's broadcast."""

    def assemble(self, replica: R, drawn: Sequence[int], quorum: int, talk: Dialogue) -> Assembly:
        """Those of the clients drawn for the replica's next round that take part. Raises QuorumError where
        they are fewer than the quorum."""
        return Assembly(drawn)

    def opening(self, replica: R) -> Values:
        """The values of round 0's broadcast, which opens the run."""
        return {}

    def begin(self, replica: R, broadcast: Message) -> None:
        """Takes in round 0's broadcast, which has no values here; a replica may see it more than once."""
        broadcast.only()

    def notes(self, replica: R) -> list[str]:
        """Lines for the log, before the first round: what its user should know about the settings."""
        return []

    def norm(self, replica: R, update: Message) -> float:
        """How large an update is beside others of its round: the Euclidean norm of its floats in arrays."""
        return math.hypot(*map(_norm, update.values.values()))

    def seeds(self, message: Message) -> list[int]:
        """The seeds in an update, or in a broadcast those of its updates, none of which may come again."""
        return []

    def open(self, replica: R) -> bytes:
        """Round 0's broadcast."""
        return wire.encode(self._broadcast(replica, 0, self.opening(replica), replica.weights))

    def rebuild(self, replica: R, broadcast: bytes) -> None:
        """Takes the replica from round r - 1 to r with round r's broadcast; does nothing if it is there.

        From any earlier round, where broadcasts are self-contained. Raises WireError for bytes that are not
        this broadcast, and DisagreementError where the weights are not those that it says it leads to.
        """
        message = wire.decode(broadcast, copy=False)
        check(self.name, "broadcast", "algorithm", self.name, message.algorithm)
        check(self.name, "broadcast", "kind", "broadcast", message.kind)
        if replica.run != wire.NO_DIGEST:
            check(self.name, "broadcast", "run", replica.run.hex(), message.run.hex())
        if message.round <= replica.round and replica.round > 0:
            return  # applied before
        if message.round > 0 and not self.self_contained:
            check(self.name, "broadcast", "round", replica.round + 1, message.round)
        check(self.name, "broadcast", "digest", replica.digest.hex(), message.digest.hex())
        if message.round == 0:
            self.begin(replica, message)
        else:
            self.advance(replica, message)
        replica.run, replica.round = message.run, message.round
        if message.weights != wire.NO_DIGEST:
            self._compare_weights(replica, message.weights)

    def train_and_encode(self, replica: R, data: LocalData, watch: Stopwatch) -> tuple[bytes, float]:
        """Trains on the client's data and encodes the update; also the training loss."""
        digest = replica.digest
        values, loss = self.contribute(replica, data, watch)
        update = Message(
            self.name,
            "update",
            digest,
            data.round,
            data.client,
            data.weight,
            values,
            run=replica.run,
            weights=replica.weights,
        )
        return wire.encode(update), loss

    def check_update(self, replica: R, message: Message) -> None:
        """Raises WireError unless the message is a client's update for the replica's next round."""
        sender = message.sender
        check(self.name, sender, "algorithm", self.name, message.algorithm)
        check(self.name, sender, "kind", "update", message.kind)
        check(self.name, sender, "run", replica.run.hex(), message.run.hex())
        check(self.name, sender, "round", replica.round + 1, message.round)
        check(self.name, sender, "digest", replica.digest.hex(), message.digest.hex())
        check(self.name, sender, "weights", replica.weights.hex(), message.weights.hex())
        if not 1 / LARGEST_WEIGHT <= message.weight <= LARGEST_WEIGHT:
            raise WireError(f"{self.name}: {sender} must have weight in [2^-64, 2^64], got {message.weight}")
        self.check_values(replica, message)

    def client_update(self, replica: R, data: LocalData, broadcasts: Sequence[bytes]) -> Reply:
        """A client's part of a round: rebuild the global model from what the server relays, train, encode.

        Training that fails, or gives an update that is not finite, is told in the reply and not raised. Where
        the weights are not the server's, the reply has a dissent with the digests of all parameters.
        """
        watch = Stopwatch()
        received = sum(map(len, broadcasts))
        try:
            replica.rewind()  # nothing that a client of its own would do
            with watch("rebuild"):
                for broadcast in broadcasts:
                    self.rebuild(replica, broadcast)
                if replica.marked != replica.round:
                    replica.mark()
            payload, loss = self.train_and_encode(replica, data, watch)
        except DisagreementError as error:
            return Reply(data.client, self._dissent(replica, data, error.digests), received, math.nan, watch)
        except (LocalFailure, wire.NotFiniteError) as failure:
            return Reply(data.client, b"", received, math.nan, watch, str(failure))
        return Reply(data.client, payload, received, loss, watch)

    def server_apply(self, replica: R, updates: Updates) -> bytes:
        """The server's part of a round: w_r from the clients' updates; returns the broadcast.

        Raises NotFiniteError, and leaves the replica as it is, where numbers in the broadcast are not finite;
        also where the weights that they lead to are not, and then these weights are lost.
        """
        message = self._broadcast(replica, replica.round + 1, self.combine(replica, updates))
        wire.check(message)
        self.advance(replica, message)
        if not all(map(_all_finite, replica.held)):
            raise wire.NotFiniteError(f"{self.name}: weights after round {message.round} must be finite")
        replica.round = message.round
        if replica.weights != wire.NO_DIGEST:
            replica.weights = digests.together(digests.of_each(replica.held))
        return wire.encode(replace(message, weights=replica.weights))

    def _broadcast(self, replica: R, round_: int, values: Values, weights: bytes = wire.NO_DIGEST) -> Message:
        return Message(
            self.name, "broadcast", replica.digest, round_, values=values, run=replica.run, weights=weights
        )

    def _compare_weights(self, replica: R, expected: bytes) -> None:
        each = replica.digests()
        replica.weights = digests.together(each)
        if replica.weights != expected:
            raise DisagreementError(
                f"{self.name}: expected weights {expected.hex()} after round {replica.round}, got "
                f"{replica.weights.hex()}",
                each,
            )

    def _dissent(self, replica: R, data: LocalData, each: list[bytes]) -> bytes:
        values = {"digests": np.frombuffer(b"".join(each), np.uint8)}
        message = Message(
            self.name,
            "dissent",
            replica.digest,
            data.round,
            data.client,
            values=values,
            run=replica.run,
            weights=replica.weights,
        )
        return wire.encode(message)


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


def check_packed(message: Message, like: Sequence[Tensor]) -> None:
    """Raises WireError unless the message has what `pack` makes of such tensors."""
    if len(message.values) != len(like):
        raise WireError(f"{message.algorithm}: expected {len(like)} tensors, got {len(message.values)}")
    for index, tensor in enumerate(like):
        _packed(message, index, tensor)


def unpack(message: Message, index: int, like: Tensor) -> Tensor:
    """The tensor of this index of what `pack` made, in the shape and on the device of `like`."""
    array = _packed(message, index, like).copy()
    if like.dtype == torch.bfloat16:
        flat = torch.from_numpy(array.view("<u2")).view(torch.bfloat16)
    else:
        flat = torch.from_numpy(array)
    return flat.view(like.shape).to(like.device)


def _packed(message: Message, index: int, like: Tensor) -> wire.Array:
    """The flat array of this index; WireError if there is none such."""
    half = like.dtype == torch.bfloat16
    dtype = wire.BFLOAT16 if half else torch.empty(0, dtype=like.dtype).numpy().dtype
    return message.array(str(index), dtype, (like.numel(),))


def stream_contract(basis: str) -> int:
    """The number that stands in messages for the version of docs/streams.md and the kind of basis."""
    return CONTRACT_VERSION << 16 | KINDS[basis]


def rounded(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Sums as float32, infinite where that does not hold them: such a broadcast is refused as not finite."""
    with np.errstate(over="ignore"):
        return sums.astype(np.float32)


def check_multiples(name: str, rate: float, sums: wire.Array) -> None:
    """Raises NotFiniteError where rate times a sum is more than float32 holds, as what is applied."""
    with np.errstate(over="ignore"):
        largest = abs(rate) * float(np.abs(sums).max(initial=0))
    if largest > torch.finfo(torch.float32).max:
        raise wire.NotFiniteError(f"{name}: steps must be finite in float32, got {largest:.6g}")


def check(name: str, what: str, field: str, expected: object, got: object) -> None:
    """Raises WireError, in the algorithm's name, where the two differ."""
    if expected != got:
        raise WireError(f"{name}: {what} must have {field} {expected}, got {got}")


def _all_finite(tensor: Tensor) -> bool:
    """Without a second tensor of its size."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))


def _norm(value: wire.Value) -> float:
    """The Euclidean norm of an array of floats, infinite where float64 does not hold it; 0 for all else."""
    if not isinstance(value, np.ndarray):
        return 0.0
    if value.dtype == wire.BFLOAT16:
        tensor = torch.from_numpy(value.view("<u2").copy()).view(torch.bfloat16)
    elif value.dtype.kind == "f":
        tensor = torch.from_numpy(value.copy())
    else:
        return 0.0
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
