"""Replicas with a block plan, for the algorithms that project updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Replica, Values
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message
from ferret_ext.plan import Allocation, Granularity


@dataclass(kw_only=True)
class PlanReplica(Replica):
    """A replica and the plan that the next round's updates are projected with."""

    plan: ferret_ext.BlockPlan

    @property
    def shapes(self) -> bytes:
        return bytes.fromhex(self.plan.digest())[: wire.DIGEST_BYTES]

    def state(self) -> Values:
        return {"counts": np.array([block.k for block in self.plan.blocks], np.uint32)}

    def resume(self, state: Message) -> None:
        counts = state.array("counts", "<u4", (len(self.plan.blocks),)).tolist()
        try:
            self.plan = self.plan.with_counts(counts)
        except ValueError as error:
            raise wire.WireError(f"ferret: {error}") from None


def make_plan(
    model: Any, K: int | None, granularity: Granularity | int, allocation: Allocation
) -> ferret_ext.BlockPlan:
    """A plan over the model's trainable parameters; K None: as many coordinates as elements.

    Raises ConfigError.
    """
    named = list(model.named_parameters())
    count = sum(param.numel() for _, param in named) if K is None else K
    try:
        return ferret_ext.BlockPlan.from_parameters(
            named, count, granularity=granularity, allocation=allocation
        )
    except ValueError as error:
        raise ConfigError(f"ferret: {error}") from None
