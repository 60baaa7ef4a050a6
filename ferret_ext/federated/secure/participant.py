"""A client's part in secure aggregation: it masks its integers, and later says what unmasks a sum."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Reply, Values
from ferret_ext.federated.client import LocalFailure
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.secure import masks, messages
from ferret_ext.federated.secure.integers import bits_of
from ferret_ext.federated.secure.masks import Key, MaskError, Pair, Random
from ferret_ext.federated.wire import Message, WireError


class RefusalError(LocalFailure):
    """What a client does not do, since it would give away more than a sum."""


@dataclass
class Session:
    """An attempt at a round. opened: whose seeds with this client it has given. survivors: the clients for
    whose sum it has given shares."""

    name: bytes
    run: bytes
    round: int
    key: Key
    invitation: bytes = b""
    clients: list[int] = field(default_factory=list)
    threshold: int = 0
    pairs: dict[int, Pair] = field(default_factory=dict)
    share: bytes = b""
    opened: set[int] = field(default_factory=set)
    survivors: list[int] = field(default_factory=list)

    @property
    def context(self) -> bytes:
        """What all that is derived in it depends on."""
        return masks.context(self.run, self.round, self.name)

    def has(self, message: Message) -> bool:
        """Whether the message is of it. Raises WireError."""
        named = messages.session_of(message), message.run, message.round
        return named == (self.name, self.run, self.round)


class Participant:
    """A client's keys and what it has given away, of its newest session; keys of former ones are forgotten.

    A client that was started again has none, so that its update is missing from the round's sum.
    """

    def __init__(self, client: int, random: Random = os.urandom) -> None:
        self.client = client
        self._random = random
        self._session: Session | None = None
        self._summed: dict[tuple[bytes, int], list[int]] = {}  # run and round -> the clients in its sum

    def reply(self, request: bytes) -> Reply:
        """The answer to a request, or why there is none."""
        answer, failure = b"", ""
        try:
            answer = self.answer(request)
        except (WireError, MaskError, RefusalError) as error:
            failure = str(error)
        return Reply(self.client, answer, len(request), math.nan, Stopwatch(), failure)

    def answer(self, request: bytes) -> bytes:
        """The answer to a request for keys, pairs or shares; the same one where it is asked again.

        Raises WireError, MaskError and RefusalError, and then it has given nothing away.
        """
        message = messages.read(request, "request")
        stage = message.value("stage", str)
        if stage == "keys":
            message.only("stage", "session")
            return self._write(message, key=np.frombuffer(self._begin(message).key.public, np.uint8))
        session = self._of(message)
        if not session.share:
            raise RefusalError("expected a request for an update first")
        if stage == "pairs":
            message.only("stage", "session", "dropped")
            return self._write(message, seeds=self._pairs(session, messages.clients_of(message, "dropped")))
        if stage == "shares":
            message.only("stage", "session", "survivors", "sealed")
            survivors = messages.clients_of(message, "survivors")
            sealed = messages.rows_of(message, "sealed", len(survivors), masks.SEALED_BYTES)
            return self._write(message, shares=self._shares(session, survivors, sealed))
        raise WireError(f"{messages.NAME}: request must have stage keys, pairs or shares, got {stage!r:.80}")

    def join(self, invitation: bytes) -> int:
        """Takes note of who takes part in the round; the bits of their integers. Raises RefusalError."""
        if not invitation:
            raise RefusalError("expected an invitation, since ferret.secure_aggregation is set, got none")
        try:
            return bits_of(len(self._join(invitation).clients))
        except (WireError, MaskError) as error:
            raise RefusalError(str(error)) from None

    def _join(self, invitation: bytes) -> Session:
        message = messages.read(invitation, "request")
        message.only("stage", "session", "threshold", "clients", "keys")
        session = self._of(message)
        if session.invitation:
            if session.invitation != invitation:
                raise RefusalError("expected one invitation a session, got another one")
            return session
        clients, threshold = messages.clients_of(message, "clients"), message.value("threshold", int)
        keys = messages.rows_of(message, "keys", len(clients), masks.KEY_BYTES)
        if (self.client, session.key.public) not in zip(clients, keys, strict=True):
            raise RefusalError(f"expected an invitation of client {self.client} with its newest key")
        if len(clients) < 2 or not len(clients) / 2 < threshold <= len(clients):
            raise RefusalError(
                f"expected 2 clients or more and a threshold of more than half, got {len(clients)} and "
                f"{threshold}"
            )
        others = {client: key for client, key in zip(clients, keys, strict=True) if client != self.client}
        session.pairs = {client: session.key.agree(key, session.context) for client, key in others.items()}
        session.invitation, session.clients, session.threshold = invitation, clients, threshold
        return session

    def hide(self, integers: npt.NDArray[np.int64]) -> Values:
        """What its update says of its integers [K]. Once a session. Raises RefusalError."""
        session = self._session
        if session is None or not session.invitation:
            raise RefusalError("expected to join a round first")
        if session.share:
            raise RefusalError("expected one update a session: a second one would be under the same masks")
        secret = self._random(masks.SHARE_BYTES)
        masked = integers.astype(np.uint32) + masks.own_stream(secret, session.context, len(integers))
        for other, pair in session.pairs.items():
            mask = masks.stream(pair.seed, len(integers))
            masked = masked + mask if other > self.client else masked - mask
        shares = dict(
            zip(session.clients, masks.split(secret, session.threshold, len(session.clients)), strict=True)
        )
        sealed = [
            masks.seal(session.pairs[client].to, shares[client])
            if client != self.client
            else bytes(masks.SEALED_BYTES)
            for client in session.clients
        ]
        session.share = shares[self.client]
        return {
            "session": session.name,
            "masked": masked,
            "sealed": messages.rows(sealed, masks.SEALED_BYTES),
        }

    def _begin(self, request: Message) -> Session:
        """The session of this name, with a new key unless it is the newest already."""
        if self._session is None or not self._session.has(request):
            name = messages.session_of(request)
            self._session = Session(name, request.run, request.round, Key(self._random))
        return self._session

    def _of(self, message: Message) -> Session:
        """The session that a message is of. Raises RefusalError."""
        if self._session is None or not self._session.has(message):
            raise RefusalError(
                "expected a request of the newest session, got one whose keys are not there; they are "
                "forgotten when a session follows, or the client is started again"
            )
        return self._session

    def _pairs(self, session: Session, dropped: Sequence[int]) -> wire.Array:
        """The seeds that it has with clients whose updates are missing."""
        if strangers := set(dropped) - session.pairs.keys():
            raise RefusalError(f"expected other clients of the round as dropped, got {min(strangers)}")
        if both := set(dropped) & set(session.survivors):
            raise RefusalError(
                f"expected clients whose shares it has not given as dropped, got {min(both)}: seed and share "
                "together would give its update away"
            )
        left = len(session.clients) - len(session.opened | set(dropped))
        if left < session.threshold:
            raise RefusalError(f"expected at least {session.threshold} clients in a sum, got {left}")
        session.opened |= set(dropped)
        return messages.rows([session.pairs[client].seed for client in dropped], masks.PAIR_BYTES)

    def _shares(self, session: Session, survivors: list[int], sealed: Sequence[bytes]) -> wire.Array:
        """Its shares of the own seeds of those whose sum it is."""
        if both := session.opened & set(survivors):
            raise RefusalError(
                f"expected survivors whose seeds it has not given, got {min(both)}: seed and share together "
                "would give its update away"
            )
        if session.opened | set(survivors) != set(session.clients):
            raise RefusalError("expected every client of the round as a survivor or dropped before")
        summed = self._summed.get((session.run, session.round), survivors)
        if summed != survivors:
            raise RefusalError(
                f"expected one sum in round {session.round}, which was that of clients {summed}, got "
                f"{survivors}: their difference would give updates away"
            )
        shares = [
            session.share if client == self.client else self._unseal(session, client, data)
            for client, data in zip(survivors, sealed, strict=True)
        ]
        session.survivors = self._summed[session.run, session.round] = survivors
        return messages.rows(shares, masks.SHARE_BYTES)

    def _unseal(self, session: Session, client: int, sealed: bytes) -> bytes:
        try:
            share = masks.unseal(session.pairs[client].of, sealed)
        except MaskError as error:
            raise MaskError(f"client {client}'s share: {error}") from None
        return share

    def _write(self, request: Message, **values: wire.Value) -> bytes:
        stage = request.value("stage", str)
        about = Message(messages.NAME, "answer", wire.NO_DIGEST, request.round, run=request.run)
        return messages.write("answer", stage, about, messages.session_of(request), self.client, **values)
