"""The updates that a round takes, and the rules by which they are added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferret_ext.federated.wire import Message

Rule = Literal["mean", "norm-clip", "median", "trimmed-mean"]
ALL_RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Summed:
    """The sum of a round's integers [K], each of [-2^bits, 2^bits], where single ones are not known."""

    integers: npt.NDArray[np.int64]
    bits: int


@dataclass(frozen=True)
class Updates:
    """A round's updates, checked, in the order in which they came.

    messages, received: decoded, and as they came. factors: what each is multiplied by, 1 but for updates that
    are clipped. rule, trim: see `config.RobustConfig`. summed: of updates that are masked.
    """

    messages: Sequence[Message]
    received: Sequence[bytes]
    factors: Sequence[float]
    rule: Rule = "mean"
    trim: float = 0.0
    summed: Summed | None = None

    @property
    def shares(self) -> list[float]:
        """p_i f_i: the updates' weights, divided by their exact sum, times their factors."""
        pairs = zip(shares(self.messages), self.factors, strict=True)
        return [share * factor for share, factor in pairs]

    def average(self, row: Callable[[Message], Tensor]) -> Tensor:
        """The updates' mean tensor by the rule, in float32, or float64 for float64 tensors.

        row: an update's tensor, of the same shape for all. Means are summed in the order of the updates.
        """
        if self.rule in ("median", "trimmed-mean"):
            return self._middle(torch.stack([_wide(row(message)) for message in self.messages]))
        mean: Tensor | None = None
        for share, message in zip(self.shares, self.messages, strict=True):
            tensor = _wide(row(message))
            mean = torch.zeros_like(tensor) if mean is None else mean
            mean.add_(tensor, alpha=share)
        assert mean is not None, "a round without updates"
        return mean

    def _middle(self, rows: Tensor) -> Tensor:
        """The mean of the middle rows of each coordinate, whatever the weights: for the median one or two."""
        count = len(rows)
        left_out = most = (count - 1) // 2
        if self.rule == "trimmed-mean":
            wanted = math.floor(self.trim * count + 1e-9)  # 0.29 * 100 is a little less than 29
            left_out = min(most, max(wanted, 1 if self.trim > 0 else 0))
        return rows.sort(0).values[left_out : count - left_out].mean(0)


def shares(updates: Sequence[Message]) -> list[float]:
    """The updates' weights, divided by their exact sum."""
    total = math.fsum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
