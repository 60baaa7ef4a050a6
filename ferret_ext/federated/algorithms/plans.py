"""Replicas with a block plan, for the algorithms that project updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ferret_ext
from ferret_ext import Packed
from ferret_ext.allocation import Allocation
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Replica, Values
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message
from ferret_ext.ops import Basis
from ferret_ext.plan import AnyPlan, Granularity


@dataclass(kw_only=True)
class PlanReplica(Replica):
    """A replica and the plan that the next round's updates are projected with."""

    plan: ferret_ext.BlockPlan

    @property
    def shapes(self) -> bytes:
        return bytes.fromhex(self.plan.digest())[: wire.DIGEST_BYTES]

    @property
    def part(self) -> AnyPlan:
        """The plan of what `params` are: the whole model, or this rank's parts."""
        if not self.cut:
            return self.plan
        from ferret_ext import fsdp

        return self.plan.shard(fsdp.ranges(self.cut))

    def project(self, part: AnyPlan, seed: int, basis: Basis) -> Tensor:
        """The coordinates of what training has changed, of the whole model on every rank.

        part: `self.part`, or with other K_l.
        """
        gammas = ferret_ext.project_difference(part, self.start, self.params, seed, basis=basis)
        return self._total(gammas)

    def norms(self) -> list[float]:
        """The norm of what training has changed in each block."""
        norms = self.part.block_norms_of_difference(self.start, self.params)
        if not self.cut:
            return norms
        squares = torch.tensor(norms, dtype=torch.float64, device=self.params[0].device).square()
        return self._total(squares).sqrt().tolist()

    def walk(
        self,
        terms: Sequence[tuple[int, Tensor | Packed, float]],
        step: float,
        basis: Basis,
        *,
        by_chance: bool = False,
    ) -> None:
        """w -= step sum_i share_i V_i gamma_i over terms (seed, gammas, share), or the optimiser's step.

        by_chance: 16-bit weights are rounded stochastically, by the first term's seed.
        """
        device, part = self.params[0].device, self.part
        rounding_seed = terms[0][0] if by_chance else None
        moved = [(seed, gammas.to(device), share) for seed, gammas, share in terms]

        def add(tensors: list[Tensor], alpha: float = 1.0) -> None:
            ferret_ext.apply_(part, tensors, moved, alpha, basis=basis, rounding_seed=rounding_seed)

        with torch.no_grad():
            if self.optimizer is None:
                add(self.params, -step)
            else:
                self.optimizer.step(self.params, add, step)

    def _total(self, values: Tensor) -> Tensor:
        """The sum over all ranks that have a part of the model."""
        if not self.cut:
            return values
        from ferret_ext import fsdp

        return fsdp.total(values, self.cut)

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
