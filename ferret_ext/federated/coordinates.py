"""How coordinates stand in a message: as floats, or as a few bits each with one scale a block.

    float32   gammas float32 [K]
    float16   gammas float16 [K], scales float32 [L]: coordinate = scale of its block * gamma, |gamma| <= 1
    intB      gammas uint8 [ceil(K B / 8)], scales float32 [L]: B-bit codes one after the other, the first in
              the lowest bits; coordinate = scale * level

The levels of B bits are the odd numbers from 1 - 2^B to 2^B - 1, code c standing for 2 c + 1 - 2^B. For two
bits and more the scale is the block's largest magnitude over the largest level, and a coordinate is rounded
up or down at random, so that its mean over the draws is the coordinate itself. One bit keeps the sign: since
coordinates of an update are nearly normal with one variance (central limit, d_l large), pi/2 times their mean
magnitude as scale makes the reconstruction unbiased over bases, as the float one is.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ferret_ext import BlockPlan
from ferret_ext.federated.wire import Array, Message, Value, WireError

Coordinates = Literal["float32", "float16", "int8", "int4", "int2", "int1"]
KINDS: tuple[Coordinates, ...] = get_args(Coordinates)
BITS: dict[str, int] = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}

Floats = npt.NDArray[np.float32]


def names(kind: Coordinates) -> list[str]:
    """Of the values that `write` gives."""
    return ["gammas"] if kind == "float32" else ["gammas", "scales"]


def write(gammas: Floats, plan: BlockPlan, kind: Coordinates, seed: int) -> dict[str, Value]:
    """The values of a message for coordinates float32 [K]. seed: of the random rounding."""
    if kind == "float32":
        return {"gammas": gammas}
    if kind == "float16":
        scales = _largest(gammas, plan)
        return {"gammas": (gammas / _each(_or_one(scales), plan)).astype(np.float16), "scales": scales}
    bits = BITS[kind]
    scales = _largest(gammas, plan) / np.float32(2**bits - 1) if bits > 1 else _mean_magnitude(gammas, plan)
    codes = _codes(gammas / _each(_or_one(scales), plan), bits, seed)
    return {"gammas": _pack(codes, bits), "scales": scales}


def read(message: Message, plan: BlockPlan, kind: Coordinates) -> Floats:
    """Coordinates float32 [K] of a message; WireError if they do not fit the plan and kind."""
    if kind == "float32":
        return message.array("gammas", "<f4", (plan.K,))
    scales = message.array("scales", "<f4", (len(plan.blocks),))
    if (scales < 0).any():
        raise WireError(f"{message.algorithm}: {message.sender} must have scales >= 0, got {scales.min()}")
    if kind == "float16":
        levels = message.array("gammas", "<f2", (plan.K,)).astype(np.float32)
    else:
        bits = BITS[kind]
        packed = message.array("gammas", "u1", ((plan.K * bits + 7) // 8,))
        levels = 2 * _unpack(packed, bits, plan.K).astype(np.float32) - np.float32(2**bits - 1)
    with np.errstate(over="ignore"):
        gammas = levels * _each(scales, plan)
    if not np.isfinite(gammas).all():
        raise WireError(f"{message.algorithm}: {message.sender} must have finite coordinates")
    return gammas


def _codes(scaled: Floats, bits: int, seed: int) -> npt.NDArray[np.uint8]:
    """The codes [K] of coordinates over their scales. The one below, or above as often as it is nearer."""
    if bits == 1:
        return (scaled >= 0).astype(np.uint8)
    place = (scaled.astype(np.float64) + (2**bits - 1)) / 2  # codes are whole numbers here
    below = np.floor(place)
    draws = np.random.Generator(np.random.PCG64(seed)).random(len(place))
    codes: npt.NDArray[np.uint8] = np.clip(below + (draws < place - below), 0, 2**bits - 1).astype(np.uint8)
    return codes


def _pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes of so many bits one after the other, the first in the lowest bits of the first byte."""
    each = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(each.reshape(-1), bitorder="little")


def _unpack(packed: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    each = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]


def _largest(gammas: Floats, plan: BlockPlan) -> Floats:
    return np.maximum.reduceat(np.abs(gammas), plan.starts)


def _mean_magnitude(gammas: Floats, plan: BlockPlan) -> Floats:
    """pi/2 times the mean magnitude of each block's coordinates."""
    sums = np.add.reduceat(np.abs(gammas).astype(np.float64), plan.starts)
    return (np.pi / 2 * sums / [block.k for block in plan.blocks]).astype(np.float32)


def _or_one(scales: Floats) -> Floats:
    """The scales, 1 for those that are 0, whose coordinates are 0 too."""
    return np.where(scales == 0, np.float32(1), scales)


def _each(scales: Floats, plan: BlockPlan) -> Floats:
    """Each coordinate's scale [K]."""
    return np.repeat(scales, [block.k for block in plan.blocks])
