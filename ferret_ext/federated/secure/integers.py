"""Coordinates as integers in a public range, whose sums are exact.

A round of N clients has integers of [-2^bits, 2^bits] with N 2^bits <= 2^30: a sum stays below a quarter of
2^32, and one that does not shows that a mask was wrong. Coordinates of block l must lie within 2^reach_l
c_l, where c_l is d_l / K_l, by which coordinates grow with a block, rounded up to a power of two. All units
are powers of two.

The reach is public: round 1's is `ferret.secure_range`, a later round's HEADROOM times the root mean square
of the block's coordinates in the last round's mean, over d_l / K_l. That leaves room for single updates,
which are up to sqrt(N) times as long as their mean where they are at right angles, and for their largest
coordinate. No block gets less than a 128th of what the largest one gets, since the block of an embedding may
have stood still.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ferret_ext import BlockPlan
from ferret_ext.federated.client import LocalFailure

HEADROOM = 1024.0
SMALLEST = 1 / 128  # of the largest block's root mean square
LARGEST_REACH = 900  # 2^reach c_l and its units stay normal float64
SUM_BITS = 30

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Reaches = npt.NDArray[np.int16]


def bits_of(clients: int) -> int:
    """Of the integers in a round of so many clients."""
    return SUM_BITS - (clients - 1).bit_length()


def first_reaches(plan: BlockPlan, largest: float) -> Reaches:
    """For weights that change by up to `largest`, roughly."""
    return np.full(len(plan.blocks), _exponent(largest), np.int16)


def next_reaches(plan: BlockPlan, reaches: Reaches, mean: Floats) -> Reaches:
    """Those of the round after one with this mean of the coordinates."""
    ends = [start + block.k for start, block in zip(plan.starts, plan.blocks, strict=True)]
    parts = [mean[start:end].astype(float) for start, end in zip(plan.starts, ends, strict=True)]
    sizes = [
        math.sqrt(math.fsum(part * part) / block.k) * block.k / block.numel
        for part, block in zip(parts, plan.blocks, strict=True)
    ]
    if not 0 < max(sizes) < math.inf:
        return reaches
    least = SMALLEST * max(sizes)
    return np.array([_exponent(HEADROOM * max(size, least)) for size in sizes], np.int16)


def units(plan: BlockPlan, reaches: Reaches, bits: int) -> npt.NDArray[np.float64]:
    """What 1 stands for, for each coordinate [K]."""
    each = [
        math.ldexp(1.0, int(reach) + _exponent(block.numel / block.k) - bits)
        for reach, block in zip(reaches, plan.blocks, strict=True)
    ]
    return np.repeat(each, [block.k for block in plan.blocks])


def to_integers(plan: BlockPlan, reaches: Reaches, gammas: Floats, bits: int) -> Integers:
    """Coordinates [K] as the nearest integers, ties to even. Raises LocalFailure where one does not fit: none
    is cut off. The text goes to the server, and says nothing of the coordinates."""
    unit = units(plan, reaches, bits)
    wide = gammas.astype(float)
    if not (np.abs(wide) <= unit * 2.0**bits).all():  # nor where one is NaN
        raise LocalFailure(
            "coordinates must lie within the round's public range, and not all do: nothing is sent; that of "
            "round 1 is ferret.secure_range"
        )
    return np.rint(wide / unit).astype(np.int64)


def _exponent(value: float) -> int:
    """The least e with 2^e >= value, within bounds."""
    mantissa, exponent = math.frexp(value)
    return max(-LARGEST_REACH, min(LARGEST_REACH, exponent - (mantissa == 0.5)))
