"""Ferret with a shared basis, whose server sees the sum of the coordinates and no single client's.

    update     contract int, seed int, session bytes, masked uint32 [K], sealed uint8 [clients, 32]
    broadcast  contract int, step float, gammas float32 [K], next_seed int, reaches int16 [L]; round 0's:
               contract, next_seed, reaches

The mean in the broadcast is that of the integers, times their units and rounded to float32. All clients count
alike: the server could not tell whether a client multiplies by the weight that it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import LocalData, Values, check, rounded
from ferret_ext.federated.algorithms.ferret import SharedFerret, SharedReplica, first_plan
from ferret_ext.federated.algorithms.server_optimizer import ServerOptimizer
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.client import LocalFailure
from ferret_ext.federated.dialogue import Dialogue
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.secure import integers, masks, messages
from ferret_ext.federated.secure.assembly import MaskedSum, gather
from ferret_ext.federated.secure.integers import Reaches
from ferret_ext.federated.wire import Message


@dataclass(kw_only=True)
class SecureReplica(SharedReplica):
    """A replica and the public range of the next round's coordinates (see `integers`)."""

    reaches: Reaches = field(default_factory=lambda: np.zeros(0, np.int16))

    def state(self) -> Values:
        return {**super().state(), "reaches": self.reaches}

    def resume(self, state: Message) -> None:
        super().resume(state)
        self.reaches = reaches_in(state, self)


@dataclass(frozen=True)
class SecureFerret(SharedFerret):
    """`SharedFerret` by integers that leave their clients masked."""

    name = messages.NAME
    rules = ("mean",)
    relays = (*SharedFerret.relays, "reaches")

    def __post_init__(self) -> None:
        masks.require()

    def replicate(self, model: Any) -> SecureReplica:
        plan = first_plan(self.config, model)
        params = plan.select(model.named_parameters())
        return SecureReplica(model, params, plan=plan, optimizer=ServerOptimizer.on(self.server, params))

    def opening(self, replica: SharedReplica) -> Values:
        first = integers.first_reaches(replica.plan, self.config.secure_range)
        return {**super().opening(replica), "reaches": first}

    def begin(self, replica: SharedReplica, broadcast: Message) -> None:
        super().begin(replica, broadcast)
        self._take_reaches(replica, broadcast)

    def assemble(
        self, replica: SharedReplica, drawn: Sequence[int], quorum: int, talk: Dialogue
    ) -> MaskedSum:
        about = Message(self.name, "request", wire.NO_DIGEST, replica.round + 1, run=replica.run)
        return gather(about, drawn, quorum, self.config.secure_threshold, talk)

    def contribute(self, replica: SharedReplica, data: LocalData, watch: Stopwatch) -> tuple[Values, float]:
        assert isinstance(replica, SecureReplica)
        if data.participant is None:
            raise LocalFailure("expected a client that keeps keys, since ferret.secure_aggregation is set")
        bits = data.participant.join(data.invitation)
        values, loss = self.project(replica, data, replica.next_seed, watch)
        gammas = values["gammas"]
        assert isinstance(gammas, np.ndarray)
        whole = integers.to_integers(replica.plan, replica.reaches, gammas, bits)
        with watch("project"):
            hidden = data.participant.hide(whole)
        return {"contract": values["contract"], "seed": values["seed"], **hidden}, loss

    def check_values(self, replica: SharedReplica, update: Message) -> None:
        update.only("contract", "seed", "session", "masked", "sealed")
        check(self.name, update.sender, "contract", self.contract, update.value("contract", int))
        check(self.name, update.sender, "seed", replica.next_seed, update.value("seed", int))
        update.array("masked", "<u4", (replica.plan.K,))

    def norm(self, replica: SharedReplica, update: Message) -> float:
        """Nobody can tell."""
        return 0.0

    def combine(self, replica: SharedReplica, updates: Updates) -> Values:
        assert isinstance(replica, SecureReplica)
        assert updates.summed is not None, "an update that is still masked"
        total, bits = updates.summed.integers, updates.summed.bits
        unit = integers.units(replica.plan, replica.reaches, bits)
        count = len(updates.messages) if updates.release is None else updates.release.expected
        mean = rounded(total.astype(float) * unit / count)
        return {
            **self.broadcast_of(replica, mean),
            "reaches": integers.next_reaches(replica.plan, replica.reaches, mean),
        }

    def advance(self, replica: SharedReplica, broadcast: Message) -> None:
        reaches_in(broadcast, replica)  # before anything is changed
        super().advance(replica, broadcast)
        self._take_reaches(replica, broadcast)

    def _take_reaches(self, replica: SharedReplica, broadcast: Message) -> None:
        assert isinstance(replica, SecureReplica)
        replica.reaches = reaches_in(broadcast, replica)


def reaches_in(message: Message, replica: SharedReplica) -> Reaches:
    """The exponents of a message, within bounds. Raises WireError."""
    found: Reaches = message.array("reaches", "<i2", (len(replica.plan.blocks),)).copy()
    if (np.abs(found.astype(int)) > integers.LARGEST_REACH).any():
        most = integers.LARGEST_REACH
        raise wire.WireError(f"{messages.NAME}: {message.sender} must have reaches in [-{most}, {most}]")
    return found
