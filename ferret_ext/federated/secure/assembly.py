"""The server's part in secure aggregation: who takes part in a round, and the sum of their integers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.updates import Summed, Updates
from ferret_ext.federated.dialogue import Assembly, Dialogue, too_few
from ferret_ext.federated.errors import RunError
from ferret_ext.federated.secure import masks, messages
from ferret_ext.federated.secure.integers import bits_of
from ferret_ext.federated.secure.masks import Random, Words
from ferret_ext.federated.wire import Message, WireError

FEWEST = 2  # clients in a sum


def gather(
    about: Message,
    drawn: Sequence[int],
    quorum: int,
    share: float,
    talk: Dialogue,
    random: Random = os.urandom,
) -> MaskedSum:
    """Asks the clients that were drawn for their keys; those that answer take part.

    about: of the run and round. share: of them, whose updates the round needs. Raises QuorumError.
    """
    session, least = random(masks.SESSION_BYTES), max(FEWEST, quorum)
    request = messages.write("request", "keys", about, session, 0)
    answers, failures = talk(dict.fromkeys(drawn, request), len(drawn), least)
    keys, bad = _read(answers, "keys", about, session, "key", (masks.KEY_BYTES,))
    failures |= bad
    for client in drawn:
        if client not in keys:
            talk.leave_out(client, failures.get(client, "no key came in time"))
    if len(keys) < least:
        raise too_few(about.round, "keys", least, failures, len(keys))
    clients = sorted(keys)
    threshold = max(FEWEST, len(clients) // 2 + 1, int(np.ceil(share * len(clients))))
    values: dict[str, wire.Value] = {
        "threshold": threshold,
        "clients": messages.numbers(clients),
        "keys": messages.rows([keys[client].tobytes() for client in clients], masks.KEY_BYTES),
    }
    invitation = messages.write("request", "update", about, session, 0, **values)
    return MaskedSum(clients, invitation, threshold, about=about, session=session)


@dataclass(frozen=True, kw_only=True)
class MaskedSum(Assembly):
    """A round under way. least: the threshold, of updates and of shares alike."""

    about: Message
    session: bytes

    def check(self, update: Message) -> None:
        if (session := messages.session_of(update)) != self.session:
            raise WireError(
                f"{messages.NAME}: {update.sender} must have session {self.session.hex()}, got "
                f"{session.hex()}"
            )
        messages.rows_of(update, "sealed", len(self.clients), masks.SEALED_BYTES)

    def settle(self, updates: Updates, talk: Dialogue) -> Updates:
        """The updates whose sum it is, with the sum. Raises QuorumError and RunError."""
        present = {message.client: message for message in updates.messages}
        seeds = self._pairs(present, talk)
        words = self._unmasked(present, self._secrets(present, talk), seeds)
        summed = Summed(words.view(np.int32).astype(np.int64), bits_of(len(self.clients)))
        largest, most = int(np.abs(summed.integers).max()), len(present) << summed.bits
        if largest > most:
            raise RunError(
                f"round {self.about.round}: expected a sum of at most {most} in every coordinate, got "
                f"{largest}: a client's masks or numbers are not what was agreed on"
            )
        return self._only(updates, present, summed)

    def _unmasked(
        self,
        present: Mapping[int, Message],
        secrets: Mapping[int, bytes],
        seeds: Mapping[int, Mapping[int, bytes]],
    ) -> Words:
        """The sum of the updates without their own masks and those that they have with missing clients."""
        count = next(iter(present.values())).value("masked", np.ndarray).size
        total: Words = np.zeros(count, np.uint32)
        for client, message in present.items():
            total += message.array("masked", "<u4", (count,))
            total -= masks.own_stream(secrets[client], self._context, count)
            for other in set(self.clients) - present.keys():
                mask = masks.stream(seeds[client][other], count)
                total += -mask if other > client else mask
        return total

    @property
    def _context(self) -> bytes:
        return masks.context(self.about.run, self.about.round, self.session)

    def _pairs(self, present: dict[int, Message], talk: Dialogue) -> dict[int, dict[int, bytes]]:
        """The seeds of each present client with each missing one. Who does not give them is missing too."""
        seeds: dict[int, dict[int, bytes]] = {client: {} for client in present}
        asked: set[int] = set()
        while new := sorted(set(self.clients) - present.keys() - asked):
            self._check_enough("updates", present, {})
            request = messages.write(
                "request", "pairs", self.about, self.session, 0, dropped=messages.numbers(new)
            )
            answers, failures = talk(dict.fromkeys(present, request), len(present), self.least)
            shape = (len(new), masks.PAIR_BYTES)
            given, bad = _read(answers, "pairs", self.about, self.session, "seeds", shape)
            for client in [client for client in present if client not in given]:
                del present[client]
                talk.leave_out(client, (failures | bad).get(client, "no seeds came in time"))
            for client in present:
                seeds[client] |= dict(zip(new, map(bytes, given[client]), strict=True))
            asked |= set(new)
        self._check_enough("updates", present, {})
        return seeds

    def _secrets(self, present: Mapping[int, Message], talk: Dialogue) -> dict[int, bytes]:
        """The own seed of each client whose update counts."""
        survivors = sorted(present)
        requests = {
            client: messages.write(
                "request",
                "shares",
                self.about,
                self.session,
                0,
                survivors=messages.numbers(survivors),
                sealed=self._sealed_for(client, [present[sender] for sender in survivors]),
            )
            for client in survivors
        }
        answers, failures = talk(requests, self.least, self.least)
        shape = (len(survivors), masks.SHARE_BYTES)
        given, bad = _read(answers, "shares", self.about, self.session, "shares", shape)
        self._check_enough("shares", given, failures | bad)
        used = sorted(given)[: self.least]
        return {
            client: masks.combine([(self._place(by), bytes(given[by][row])) for by in used])
            for row, client in enumerate(survivors)
        }

    def _sealed_for(self, client: int, updates: Sequence[Message]) -> wire.Array:
        """The shares that these updates have for a client."""
        place = self._place(client)
        each = [
            messages.rows_of(it, "sealed", len(self.clients), masks.SEALED_BYTES)[place] for it in updates
        ]
        return messages.rows(each, masks.SEALED_BYTES)

    def _place(self, client: int) -> int:
        return list(self.clients).index(client)

    def _check_enough(self, what: str, got: Mapping[int, object], reasons: Mapping[int, str]) -> None:
        if len(got) < self.least:
            raise too_few(self.about.round, what, self.least, reasons, len(got))

    def _only(self, updates: Updates, present: Mapping[int, Message], summed: Summed) -> Updates:
        kept = [
            (message, payload)
            for message, payload in zip(updates.messages, updates.received, strict=True)
            if message.client in present
        ]
        taken, received = zip(*kept, strict=True)
        return replace(updates, messages=taken, received=received, factors=[1.0] * len(kept), summed=summed)


def _read(
    answers: Mapping[int, bytes],
    stage: str,
    about: Message,
    session: bytes,
    name: str,
    shape: tuple[int, ...],
) -> tuple[dict[int, wire.Array], dict[int, str]]:
    """The bytes called `name` in each answer, and what is wrong with the answers that have none."""
    taken, bad = {}, {}
    for client, data in answers.items():
        try:
            answer = messages.read(data, "answer")
            answer.only("stage", "session", name)
            got = (
                answer.client,
                answer.value("stage", str),
                messages.session_of(answer),
                answer.run,
                answer.round,
            )
            if got != (client, stage, session, about.run, about.round):
                raise WireError(f"{messages.NAME}: {answer.sender} must be client {client}'s to this request")
            taken[client] = answer.array(name, "u1", shape)
        except WireError as error:
            bad[client] = str(error)
    return taken, bad
