"""How the K coordinates of a plan are shared out among its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

Allocation = Literal["size", "sqrt-size", "equal", "norm", "sqrt-norm", "mse", "curvature"]


def allocate(
    numels: Sequence[int], K: int, allocation: Allocation, norms: Sequence[float] | None
) -> list[int]:
    """K_l of each block, by `BlockPlan.with_allocation`. Raises ValueError."""
    K = check_int("BlockPlan: K", K, 1, 2**63 - 1)
    if len(numels) > K:
        raise ValueError(
            f"BlockPlan: K must be at least the number of blocks, got K = {K} for {len(numels)} blocks; "
            "raise K or use a coarser granularity"
        )
    return _share_out(K, _weights(numels, allocation, norms))


def _weights(numels: Sequence[int], allocation: Allocation, norms: Sequence[float] | None) -> list[int]:
    """What K_l is proportional to, as integers, so that sharing out is exact and the same everywhere."""
    if allocation not in get_args(Allocation):
        raise ValueError(
            f"BlockPlan: allocation must be one of {', '.join(get_args(Allocation))}, got {allocation!r}"
        )
    if allocation == "size":
        return list(numels)
    if allocation == "sqrt-size":  # as exact integers
        return [math.isqrt(numel << 64) for numel in numels]
    if allocation == "equal":
        return [1] * len(numels)
    values = _checked_norms(norms, len(numels), allocation)
    largest = max(values)
    if largest == 0:  # nothing to tell the blocks apart by
        return [1] * len(numels)
    relative = [value / largest for value in values]
    if allocation == "sqrt-norm":
        relative = [math.sqrt(norm) for norm in relative]
    elif allocation == "mse":
        relative = [norm * math.sqrt(numel) for norm, numel in zip(relative, numels, strict=True)]
    elif allocation == "curvature":
        roots = [math.sqrt(math.sqrt(numel)) for numel in numels]
        relative = [norm * math.sqrt(norm) * root for norm, root in zip(relative, roots, strict=True)]
    return [round(weight * 2**60) for weight in relative]


def _checked_norms(norms: Sequence[float] | None, count: int, allocation: str) -> list[float]:
    if norms is None or len(norms) != count:
        got = "none" if norms is None else str(len(norms))
        raise ValueError(
            f'BlockPlan: allocation "{allocation}" needs norms, one a block: expected {count}, got {got}'
        )
    values = [float(norm) for norm in norms]
    for index, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"BlockPlan: norms must be finite and >= 0, got {value} for block {index}")
    return values


def _share_out(K: int, weights: Sequence[int]) -> list[int]:
    """K as integers >= 1 in proportion to the weights: largest remainders, ties to the earlier block.

    Blocks whose share is below 1 get 1, and the others share what is left.
    """
    shares = [1] * len(weights)
    left, others = K, list(range(len(weights)))
    while True:
        total = sum(weights[i] for i in others)
        small = {i for i in others if weights[i] * left < total}
        if not small:
            break
        left -= len(small)
        others = [i for i in others if i not in small]
    for i in others:
        shares[i] = weights[i] * left // total
    spare = K - sum(shares)
    for i in sorted(others, key=lambda i: -(weights[i] * left % total))[:spare]:
        shares[i] += 1
    return shares


def check_int(what: str, value: object, low: int, high: int) -> int:
    """The value as an int in [low, high]; ValueError for anything else."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ValueError(f"{what} must be an int in [{low}, {high}], got {value!r}")
    return int(value)
