"""The updates that a round takes, and the rules by which they are added up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferret_ext.federated.privacy import Release
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
    are clipped. rule, trim: see `config.RobustConfig`. summed: of updates that are masked. release: how their
    sum is made private, if it is.
    """

    messages: Sequence[Message]
    received: Sequence[bytes]
    factors: Sequence[float]
    rule: Rule = "mean"
    trim: float = 0.0
    summed: Summed | None = None
    release: Release | None = None

    @property
    def hashes(self) -> list[bytes]:
        """SHA-256 of each as it came; zeros where a hash would tell a guess of it from a bad one."""
        if self.release is not None:
            return [bytes(hashlib.sha256().digest_size)] * len(self.received)
        return [hashlib.sha256(payload).digest() for payload in self.received]

    @property
    def shares(self) -> list[float]:
        """p_i f_i: the updates' weights, divided by their exact sum, times their factors. Where the sum is
        made private, the divisor is the number of clients that were expected."""
        if self.release is not None:
            return [factor / self.release.expected for factor in self.factors]
        pairs = zip(shares(self.messages), self.factors, strict=True)
        return [share * factor for share, factor in pairs]

    def average(self, row: Callable[[Message], Tensor]) -> Tensor:
        """The updates' mean tensor by the rule, in float32, or float64 for float64 tensors and private sums.

        row: an update's tensor, of the same shape for all. Means are summed in the order of the updates. Call
        it once for each part of an update: the noise of a private sum is another one each time.
        """
        if self.rule in ("median", "trimmed-mean"):
            return self._middle(torch.stack([_wide(row(message)) for message in self.messages]))
        mean: Tensor | None = None
        for share, message in zip(self.shares, self.messages, strict=True):
            tensor = _wide(row(message)) if self.release is None else row(message).double()
            mean = torch.zeros_like(tensor) if mean is None else mean
            mean.add_(tensor, alpha=share)
        assert mean is not None, "a round without updates"
        if self.release is not None:
            self.release.add_noise(mean)
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
