"""How coordinates stand in a message: as floats, or as a few bits each with one scale a block.

    float32   gammas float32 [K]
    float16   gammas float16 [K], scales float32 [L]: coordinate = scale of its block * gamma, |gamma| <= 1
    intB      gammas uint8 [ceil(K B / 8)], scales uint8 [L], unit float: levels of B bits
    choiceC   gammas uint8 [ceil(K (C + 1) / 8)], scales uint8 [L], unit float: the sign of the largest of
              2^C candidates, and which one it was

The codes of the last two are those of `ferret_ext.pack`. A byte c of their scales stands for unit times
(32 - c mod 16) / 32 * 2^-(c div 16), the nearest one, at most 3% off, and 255 for 0. The unit is the largest
scale.
"""

from __future__ import annotations

from typing import TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, Packed, Packing, PlanShard
from ferret_ext.federated.config import Coordinates
from ferret_ext.federated.wire import Message, Value, WireError
from ferret_ext.plan import AnyPlan

P = TypeVar("P", BlockPlan, PlanShard, AnyPlan)
KINDS: tuple[Coordinates, ...] = get_args(Coordinates)
PACKINGS: dict[str, Packing] = {
    **{f"int{bits}": Packing(bits) for bits in (8, 4, 2, 1)},
    **{f"choice{choice}": Packing(1, choice) for choice in (4, 8, 10, 12)},
}

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SHARES: Floats = np.array([(32 - c % 16) / 2.0 ** (5 + c // 16) for c in range(255)] + [0.0], np.float32)


def most_a_block(kind: Coordinates) -> int:
    """How many coordinates a block may have before `ferret.granularity: auto` cuts it.

    64 keep the kernels' lanes full, and of forms with few bits more are needed so that the scale is a
    sixty-fourth of the block's bits, or a thirty-second of those just over the limit, which are cut in two.
    """
    if kind in PACKINGS:
        return max(64, -(-64 * 8 // PACKINGS[kind].width))
    return 128 if kind == "float16" else 64


def names(kind: Coordinates) -> list[str]:
    """Of the values that `write` gives."""
    if kind in PACKINGS:
        return ["gammas", "scales", "unit"]
    return ["gammas"] if kind == "float32" else ["gammas", "scales"]


def candidates(plan: P, kind: Coordinates) -> P:
    """The plan that updates are projected with, of which `write` keeps `plan.K` coordinates.

    Raises ValueError for more than 2^32 - 1 columns in a block.
    """
    return PACKINGS[kind].candidates(plan) if kind in PACKINGS else plan


def write(gammas: Tensor, plan: BlockPlan, kind: Coordinates) -> dict[str, Value]:
    """The values of a message for coordinates float32 of `candidates(plan, kind)`."""
    if kind in PACKINGS:
        packed = ferret_ext.pack(plan, gammas, PACKINGS[kind])
        unit = float(packed.scales.max())
        return {
            "gammas": packed.codes.numpy(),
            "scales": _to_bytes(packed.scales.numpy(), unit),
            "unit": unit,
        }
    floats: Floats = gammas.detach().float().cpu().numpy()
    if kind == "float32":
        return {"gammas": floats}
    scales = np.maximum.reduceat(np.abs(floats), plan.starts)
    divisors = np.where(scales == 0, np.float32(1), scales)
    return {"gammas": (floats / _each(divisors, plan)).astype(np.float16), "scales": scales}


def blank(plan: BlockPlan, kind: Coordinates) -> dict[str, Value]:
    """Values of the shapes that `write` gives."""
    if kind not in PACKINGS:
        return write(torch.zeros(plan.K), plan, kind)
    codes = np.zeros(PACKINGS[kind].code_bytes(plan.K), np.uint8)
    return {"gammas": codes, "scales": np.zeros(len(plan.blocks), np.uint8), "unit": 0.0}


def read(message: Message, plan: BlockPlan, kind: Coordinates) -> Tensor | Packed:
    """The coordinates of a message, as `ferret_ext.apply_` takes them; WireError if they do not fit."""
    if kind in PACKINGS:
        return _read_packed(message, plan, PACKINGS[kind])
    if kind == "float32":
        return torch.from_numpy(message.array("gammas", "<f4", (plan.K,)).copy())
    scales = message.array("scales", "<f4", (len(plan.blocks),))
    if (scales < 0).any():
        raise WireError(f"{message.algorithm}: {message.sender} must have scales >= 0, got {scales.min()}")
    with np.errstate(over="ignore"):
        floats = message.array("gammas", "<f2", (plan.K,)).astype(np.float32) * _each(scales, plan)
    if not np.isfinite(floats).all():
        raise WireError(f"{message.algorithm}: {message.sender} must have finite coordinates")
    return torch.from_numpy(floats)


def values(plan: BlockPlan, gammas: Tensor | Packed) -> Floats:
    """Coordinates float32 [K], whatever columns they are of."""
    floats = ferret_ext.unpack(plan, gammas)[0] if isinstance(gammas, Packed) else gammas
    result: Floats = floats.numpy()
    return result


def _read_packed(message: Message, plan: BlockPlan, packing: Packing) -> Packed:
    codes = message.array("gammas", "u1", (packing.code_bytes(plan.K),))
    shares = SHARES[message.array("scales", "u1", (len(plan.blocks),))]
    unit, largest = message.value("unit", float), float(np.finfo(np.float32).max) / 2**packing.bits
    if not 0 <= unit <= largest:  # nor NaN
        who = f"{message.algorithm}: {message.sender}"
        raise WireError(f"{who} must have a unit in [0, {largest:.6g}], got {unit}")
    return Packed(torch.from_numpy(codes.copy()), torch.from_numpy(shares * np.float32(unit)), packing)


def _to_bytes(scales: Floats, unit: float) -> Bytes:
    """The byte of the nearest share of the unit."""
    wanted = scales.astype(np.float64) / (unit or 1.0)
    rising = SHARES[::-1].astype(np.float64)
    above = np.searchsorted(rising, wanted).clip(1, len(rising) - 1)
    nearer_below = wanted - rising[above - 1] < rising[above] - wanted
    places: Bytes = (len(rising) - 1 - (above - nearer_below)).astype(np.uint8)
    return places


def _each(scales: Floats, plan: BlockPlan) -> Floats:
    """Each coordinate's scale [K]."""
    return np.repeat(scales, [block.k for block in plan.blocks])
