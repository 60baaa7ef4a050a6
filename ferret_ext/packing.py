"""Coordinates in a few bits each: how many, and the codes and scales that they become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .plan import AnyPlan, BlockPlan, PlanShard

P = TypeVar("P", BlockPlan, PlanShard, AnyPlan)

LEVEL_BITS = (1, 2, 4, 8)
MAX_CHOICE = 16


@dataclass(frozen=True)
class Packing:
    """How a coordinate becomes a code of bits + choice bits (docs/streams.md, "Packed coordinates").

    bits: of its level, 1, 2, 4 or 8: one of the 2^bits odd numbers from 1 - 2^bits to 2^bits - 1.
    choice: with a sign alone (bits = 1), a coordinate may be the largest of 2^choice candidates on columns of
        their own, choice <= 16; its code says which. More columns are projected on, none more are sent.
    Raises ValueError for other numbers.
    """

    bits: int = 1
    choice: int = 0

    def __post_init__(self) -> None:
        if self.bits not in LEVEL_BITS:
            raise ValueError(f"Packing: bits must be one of {LEVEL_BITS}, got {self.bits!r}")
        most = MAX_CHOICE if self.bits == 1 else 0
        if self.choice not in range(most + 1):
            raise ValueError(
                f"Packing: choice must be an int in [0, {most}] for levels of {self.bits} bits, "
                f"got {self.choice!r}"
            )

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits + self.choice

    def code_bytes(self, count: int) -> int:
        """Bytes of so many codes, which stand one after the other without gaps."""
        return (count * self.width + 7) // 8

    def candidates(self, plan: P) -> P:
        """The plan to project with: 2^choice columns for each coordinate that is sent."""
        if self.choice == 0:
            return plan
        return plan.with_counts([block.k << self.choice for block in plan.blocks])


@dataclass(frozen=True)
class Packed:
    """The coordinates of one update: coordinate = scale of its block * level of its code.

    codes: uint8 [ceil(K (bits + choice) / 8)], the first code in the lowest bits of the first byte; of a code
        the lowest bits are (level + 2^bits - 1) / 2, the others the candidate's number.
    scales: float32 [L], finite and >= 0, on the device of the codes.
    Raises TypeError or ValueError for tensors of another kind.
    """

    codes: Tensor
    scales: Tensor
    packing: Packing = field(default_factory=Packing)

    def __post_init__(self) -> None:
        for name, dtype in (("codes", torch.uint8), ("scales", torch.float32)):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
                got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
                raise TypeError(f"Packed: {name} must be a {dtype} tensor of one dimension, got {got}")
        if self.codes.device != self.scales.device:
            raise ValueError(
                f"Packed: scales must be on {self.codes.device}, as the codes, got {self.scales.device}"
            )

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        return Packed(self.codes.to(device), self.scales.to(device), self.packing)
