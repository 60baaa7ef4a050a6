"""The server: draws the clients, turns their messages into the next model, and keeps what it relayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor

from ferret_ext.federated import digests, wire
from ferret_ext.federated.admission import Admission, Sent
from ferret_ext.federated.algorithms.base import Algorithm, R
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import PrivacyConfig, RobustConfig
from ferret_ext.federated.dialogue import Assembly, Dialogue
from ferret_ext.federated.draws import Draws
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.metrics import Rejection
from ferret_ext.federated.privacy import Release
from ferret_ext.federated.wire import Message

Broadcast = bytes | Callable[[], bytes]


class Server(Generic[R]):
    """The global model and the broadcasts that led to it, one a round from round 0 on.

    assembly: of the newest round. A broadcast is b"" when it was superseded, and a call that gives it where
    it is kept elsewhere.
    """

    def __init__(
        self,
        algorithm: Algorithm[R],
        model: Any,
        clients: Sequence[int],
        fraction: float,
        seed: int,
        *,
        run: bytes = wire.NO_DIGEST,
        robust: RobustConfig | None = None,
        verify_weights: bool = True,
        equal_weights: bool = False,
        over_selection: float = 0.0,
        privacy: PrivacyConfig | None = None,
        draws: Draws | None = None,
    ) -> None:
        """run: 8 bytes that name the run. robust, verify_weights: see the config. equal_weights: all clients
        count alike. over_selection: share of clients that are drawn beyond `fraction`. privacy: resolved.
        draws: in place of those by the seed. Raises ConfigError."""
        self.algorithm = algorithm
        self.draws = draws or Draws(clients, fraction, seed, over_selection)
        release = partial(Release.of, privacy or PrivacyConfig(), self.draws.expected)
        self.admission = Admission(algorithm, robust or RobustConfig(), equal_weights, release)
        self.replica = algorithm.replicate(model)
        self.replica.run = run
        if verify_weights:
            self.replica.weights = digests.together(digests.of_each(self.replica.held))
        opening = algorithm.open(self.replica)
        self.broadcasts: list[Broadcast] = [opening]
        algorithm.rebuild(self.replica, opening)
        self.assembly = Assembly(clients)

    @property
    def wanted(self) -> int:
        """The updates that a round is after; more clients may be drawn."""
        return self.draws.wanted

    def choose(self, round_: int) -> list[int]:
        """The round's clients, in the order of all."""
        return self.draws.of_round(round_)

    def assemble(self, drawn: Sequence[int], talk: Dialogue) -> Sequence[int]:
        """Those of the clients drawn for the next round that take part in it. Raises QuorumError."""
        quorum = self.admission.config.quorum
        self.assembly = self.algorithm.assemble(self.replica, drawn, quorum, talk)
        return self.assembly.clients

    def broadcasts_since(self, seen: int) -> list[bytes]:
        """What a client that has received `seen` broadcasts is still to receive."""
        kept = (it if isinstance(it, bytes) else it() for it in self.broadcasts[seen:])
        return [broadcast for broadcast in kept if broadcast]

    def release(self, round_: int, stored: Callable[[], bytes]) -> None:
        """Keeps a round's broadcast out of memory: `stored` gives it when it is needed again."""
        if self.broadcasts[round_]:
            self.broadcasts[round_] = stored

    def apply(
        self, chosen: Sequence[int], sent: Sequence[Sent], talk: Dialogue | None = None
    ) -> tuple[Updates, list[Rejection]]:
        """w_r from what the round's clients sent: the updates that count, and what was rejected.

        talk: with these clients, where their assembly has more to ask. Raises DisagreementError, QuorumError,
        NotFiniteError and RunError; the server stays as it is, but for weights that finite numbers have taken
        to infinity, which are lost (see `Algorithm.server_apply`).
        """
        round_, quorum = self.replica.round + 1, self.admission.config.quorum
        updates, rejections = self.admission.screen(self.replica, chosen, sent, self.assembly.check)
        updates = self.assembly.settle(updates, talk or Dialogue(round_))
        if len(updates.messages) < quorum:  # some may have gone since they sent theirs
            raise QuorumError(
                f"round {round_}: expected updates of at least {quorum} clients, got {len(updates.messages)}"
            )
        self._keep(self.algorithm.server_apply(self.replica, updates))
        for message in updates.messages:
            self.admission.remember(message)
        return updates, rejections

    def replay(self, broadcast: bytes) -> None:
        """Goes through a round that counted before, by its broadcast."""
        self.algorithm.rebuild(self.replica, broadcast)
        self._recall(broadcast)

    def recall(self, broadcast: bytes) -> None:
        """Takes note of the broadcast of a round that counted before, whose weights come from elsewhere."""
        self.replica.round += 1
        self._recall(broadcast)

    def restore(self, held: Sequence[Tensor], state: Message, digest: bytes) -> None:
        """Takes what the replica held, and its state, as they were after the last round that was recalled.

        digest: as `replica.weights` has it.
        """
        self.replica.resume(state)
        with torch.no_grad():
            for tensor, value in zip(self.replica.held, held, strict=True):
                tensor.copy_(value)
        self.replica.weights = digest

    def skip(self, rounds: int) -> None:
        """Leaves out rounds that counted before, whose broadcasts nobody needs (see `self_contained`)."""
        self.broadcasts += [b""] * rounds

    def _recall(self, broadcast: bytes) -> None:
        self.admission.remember(wire.decode(broadcast, copy=False))
        self._keep(broadcast)

    def _keep(self, broadcast: bytes) -> None:
        if self.algorithm.self_contained and self.replica.round > 1:
            self.broadcasts[-1] = b""  # nobody needs it any more, and it may be as large as the model
        self.broadcasts.append(broadcast)
