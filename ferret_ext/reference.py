"""The stream contract (docs/streams.md) in plain torch: oracle of the tests, documentation of the arithmetic.

Every function here gives, bit for bit, what its namesake in `ferret_ext` gives, at a small part of its speed,
on the CPU and without checking its arguments. Values are held in float64 whatever they stand for: it holds
integers below 2^53 exactly, and so their sums in any order. `project_float64` and `reconstruct_float64` are
the plain formulas instead, to measure the accuracy of the contract's arithmetic against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._reference_float import exponent, float32, fma32, fma64, two_to
from ._reference_stream import KINDS, integers, philox, words
from .plan import BlockPlan

__all__ = [
    "KINDS",
    "apply_",
    "basis",
    "integers",
    "philox",
    "project",
    "project_difference",
    "project_float64",
    "reconstruct",
    "reconstruct_",
    "reconstruct_float64",
    "words",
]

TILE = 512  # consecutive elements that share a scale in project
GROUP = 64  # consecutive columns that share a scale in reconstruct
RADIX = 64  # sums are folded 64 at a time
DELTA_BITS = 22
COORDINATE_BITS = 23

_CHUNK = 16 * TILE  # elements at a time: with 64 columns this keeps the memory in use to some 50 MB


# ---- project


def project(
    delta: Tensor, seed: int, K: int, *, basis: str = "rademacher", offset: int = 0, numel: int | None = None
) -> Tensor:
    """gamma [K] = V^T delta / (rho K)."""
    wide = _is_wide(delta)
    x = _flat_float64(delta)
    d = len(x) if numel is None else numel
    if len(x) == 0:
        return _to_working(torch.zeros(K), wide)
    first, tiles = _tiles(x, offset)
    groups = (range(k, min(k + GROUP, K)) for k in range(0, K, GROUP))
    sums = torch.cat(
        [_fold(_tile_values(tiles, first, seed, basis, columns, wide), first) for columns in groups]
    )
    kind = KINDS[basis]
    return _to_working(sums * (math.sqrt(d) / K * (2.0**-kind.exponent / kind.variance)), wide)


def _tiles(x: Tensor, offset: int) -> tuple[int, Tensor]:
    """The first tile's number, and the tiles [T, 512] with zeros around x."""
    before = offset % TILE
    after = -(before + len(x)) % TILE
    return offset // TILE, torch.nn.functional.pad(x, (before, after)).view(-1, TILE)


def _tile_values(tiles: Tensor, first: int, seed: int, basis: str, columns: range, wide: bool) -> Tensor:
    """sum_j x_j b(j, k) over each tile: [T, columns]."""
    values = []
    for begin in range(0, len(tiles), _CHUNK // TILE):
        x = tiles[begin : begin + _CHUNK // TILE]
        n = exponent(x.abs().amax(dim=1, keepdim=True)).clamp(min=-1000)
        q = _limbs(x * two_to(DELTA_BITS - n), DELTA_BITS, wide)
        b = integers(seed, basis, (first + begin) * TILE, x.numel(), columns).view(-1, len(x), TILE)
        # exact in any order: with |q| < 2^22 and |b| < 2^19, 512 terms stay below 2^50
        sums = [torch.einsum("ti,kti->tk", limb, b) for limb in q]
        values.append(_join(sums, DELTA_BITS) * two_to(n - DELTA_BITS))
    return torch.cat(values)


def _fold(values: Tensor, first: int) -> Tensor:
    """The values [T, K] of tiles number `first` and on, folded to [K] by the tree of radix 64."""
    while len(values) > 1:
        before = first % RADIX
        after = -(before + len(values)) % RADIX
        children = torch.nn.functional.pad(values, (0, 0, before, after)).view(-1, RADIX, values.shape[1])
        values = torch.zeros_like(children[:, 0])
        for child in children.unbind(1):
            values = values + child
        first //= RADIX
    return values[0]


# ---- reconstruct and apply


class _Update(NamedTuple):
    """A block's coordinates from one client."""

    seed: int
    gamma: Tensor
    weight: float


def reconstruct(
    gamma: Tensor,
    seed: int,
    shape: Sequence[int],
    *,
    basis: str = "rademacher",
    offset: int = 0,
    numel: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """V gamma, in the given shape."""
    wide = gamma.dtype == torch.float64 or dtype == torch.float64
    zeros = torch.zeros(math.prod(shape), dtype=torch.float64)
    d = len(zeros) if numel is None else numel
    result = _added(zeros, [_Update(seed, _flat_float64(gamma), 1.0)], 1.0, basis, offset, d, wide)
    return result.to(dtype).view(tuple(shape)).to(gamma.device if device is None else device)


def reconstruct_(
    param: Tensor,
    gamma: Tensor,
    seed: int,
    *,
    alpha: float = 1.0,
    basis: str = "rademacher",
    offset: int = 0,
    numel: int | None = None,
    rounding_seed: int | None = None,
) -> Tensor:
    """param += alpha V gamma."""
    wide = _is_wide(param, gamma)
    d = param.numel() if numel is None else numel
    update = _Update(seed, _flat_float64(gamma), 1.0)
    result = _added(_flat_float64(param), [update], alpha, basis, offset, d, wide)
    return param.copy_(_rounded(result, param.dtype, offset, rounding_seed).view(param.shape))


def _added(
    param: Tensor, updates: Sequence[_Update], alpha: float, basis: str, offset: int, d: int, wide: bool
) -> Tensor:
    """param + alpha sum_i w_i V_i gamma_i, in the working precision."""
    if len(param) == 0 or not updates:
        return _to_working(param, wide)
    scales = [_block_exponent(update.gamma, wide) for update in updates]
    largest = max(scales)
    total = torch.zeros_like(param)
    for (seed, gamma, weight), scale in zip(updates, scales, strict=True):
        value = _update_value(gamma, scale, seed, basis, offset, len(param), wide)
        total = _fma(value, math.ldexp(weight, scale - largest), total, wide)
    factor = alpha * 2.0 ** (largest - KINDS[basis].exponent) / math.sqrt(d)
    limit = torch.finfo(torch.float64 if wide else torch.float32).max
    return _to_working(_fma(total, min(max(factor, -limit), limit), param, wide), wide)


def _block_exponent(gamma: Tensor, wide: bool) -> int:
    limit = 512 if wide else 64
    return int(exponent(gamma.abs().max()).clamp(-limit, limit))


def _update_value(
    gamma: Tensor, scale: int, seed: int, basis: str, offset: int, count: int, wide: bool
) -> Tensor:
    """sum_k gamma_k b(j, k) 2^-scale: [count]."""
    groups = list(_groups(gamma, scale, wide))
    values = []
    for begin in range(0, count, _CHUNK):
        length = min(_CHUNK, count - begin)
        total, partial = torch.zeros(2, length, dtype=torch.float64)
        for index, (columns, coordinates, factor) in enumerate(groups):
            b = integers(seed, basis, offset + begin, length, columns)
            # exact in any order: with |c| < 2^23 and |b| < 2^19, 64 terms stay below 2^48
            group = _round(_join([limb @ b for limb in coordinates], COORDINATE_BITS), wide)
            # times a power of two is exact, so this sum is the fused multiply-add
            partial = _round(group * factor + partial, wide)
            if index % RADIX == RADIX - 1 or index == len(groups) - 1:
                total, partial = _round(total + partial, wide), torch.zeros_like(total)
        values.append(total)
    return torch.cat(values)


def _groups(gamma: Tensor, scale: int, wide: bool) -> Iterator[tuple[range, list[Tensor], float]]:
    """Columns, integer coordinates and factor of each group of 64 columns."""
    for begin in range(0, len(gamma), GROUP):
        g = gamma[begin : begin + GROUP]
        n = exponent(g.abs().max()).clamp(min=scale - (400 if wide else 100))
        coordinates = _limbs(g * two_to(COORDINATE_BITS - n), COORDINATE_BITS, wide)
        yield range(begin, begin + len(g)), coordinates, 2.0 ** (int(n) - COORDINATE_BITS - scale)


def basis(
    seed: int,
    k: int,
    shape: Sequence[int],
    *,
    basis: str = "rademacher",
    offset: int = 0,
    numel: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """v_k, column k of V."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    b = integers(seed, basis, offset, count, range(k, k + 1))
    v = b * 2.0 ** -KINDS[basis].exponent / math.sqrt(count if numel is None else numel)
    return v.to(dtype).view(tuple(shape)).to(device)


# ---- plans


def project_difference(
    plan: BlockPlan, old: Sequence[Tensor], new: Sequence[Tensor], seed: int, *, basis: str = "rademacher"
) -> Tensor:
    """The flat gammas [plan.K] of old - new, block by block."""
    wide = _is_wide(*old, *new)
    flat = [
        _to_working(_flat_float64(before), wide) - _to_working(_flat_float64(after), wide)
        for before, after in zip(old, new, strict=True)
    ]
    parts: list[list[Tensor]] = [[] for _ in plan.blocks]
    for tensor, start, length, _, block in plan.pieces_table.tolist():
        parts[block].append(flat[tensor][start : start + length])
    return torch.cat(
        [
            project(torch.cat(deltas), seed, block.k, basis=basis, offset=block.offset)
            for deltas, block in zip(parts, plan.blocks, strict=True)
        ]
    )


def apply_(
    plan: BlockPlan,
    params: Sequence[Tensor],
    updates: Iterable[tuple[int, Tensor, float]],
    alpha: float,
    *,
    basis: str = "rademacher",
    rounding_seed: int | None = None,
) -> None:
    """params += alpha sum_i weight_i V_i gamma_i for updates (seed_i, gammas_i, weight_i)."""
    updates = list(updates)
    wide = _is_wide(*params, *(gammas for _, gammas, _ in updates))
    of_blocks: list[list[_Update]] = [[] for _ in plan.blocks]
    for seed, gammas, weight in updates:
        for of_block, gamma in zip(of_blocks, plan.split(_flat_float64(gammas)), strict=True):
            of_block.append(_Update(seed, gamma, weight))
    results = [_flat_float64(param).clone() for param in params]
    for tensor, start, length, offset, index in plan.pieces_table.tolist():
        run = results[tensor][start : start + length]
        added = _added(run, of_blocks[index], alpha, basis, offset, plan.blocks[index].numel, wide)
        run.copy_(_rounded(added, params[tensor].dtype, offset, rounding_seed))
    for param, result in zip(params, results, strict=True):
        param.copy_(_to_working(result, wide).view(param.shape))


# ---- stochastic rounding

_FRACTIONS = {
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
}  # its bits, and where 2^n is the least normal


def _rounded(x: Tensor, dtype: torch.dtype, offset: int, seed: int | None) -> Tensor:
    """x with the fraction of a 16-bit dtype, one more if 16 random bits and the first 16 lost ones carry."""
    if seed is None or dtype not in _FRACTIONS:
        return x
    bits, least = _FRACTIONS[dtype]
    values = float32(x)
    step = two_to((exponent(values) - 1).clamp(min=least) - bits)
    steps = values.abs() / step
    lost = ((steps - steps.floor()) * 2**16).floor()
    up = lost + _rounding_bits(seed, offset, len(x)) >= 2**16
    return torch.where(values.isfinite(), torch.copysign((steps.floor() + up) * step, values), values).to(
        x.dtype
    )


def _rounding_bits(seed: int, offset: int, count: int) -> Tensor:
    """16 bits for each of `count` > 0 elements from j = `offset` on."""
    t = torch.arange(offset // 8, (offset + count - 1) // 8 + 1)
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    calls = torch.stack(philox([t & 0xFFFFFFFF, t >> 32, 0, 0x00010080], (low, high)), dim=-1)
    return (calls[..., None] >> torch.tensor([0, 16]) & 0xFFFF).flatten()[offset % 8 :][:count]


# ---- the working precision


def _is_wide(*tensors: Tensor) -> bool:
    """Whether the working precision is float64, not float32."""
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _flat_float64(x: Tensor) -> Tensor:
    return x.detach().cpu().double().reshape(-1)


def _to_working(x: Tensor, wide: bool) -> Tensor:
    return x.to(torch.float64 if wide else torch.float32)


def _round(x: Tensor, wide: bool) -> Tensor:
    return x if wide else float32(x)


def _fma(a: Tensor, b: float, c: Tensor, wide: bool) -> Tensor:
    """a b + c rounded once; b, too, is rounded to the working precision first."""
    factor = torch.tensor(b, dtype=torch.float64)
    return fma64(a, factor, c) if wide else fma32(a, float32(factor), c)


def _limbs(scaled: Tensor, bits: int, wide: bool) -> list[Tensor]:
    """|scaled| <= 2^bits as an integer below 2^bits; in float64 two: scaled ~ limbs[0] + limbs[1] 2^-bits."""
    limit = 2.0**bits - 1
    high = torch.round(scaled).clamp(-limit, limit)
    return [high, torch.round((scaled - high) * 2.0**bits).clamp(-limit, limit)] if wide else [high]


def _join(sums: Sequence[Tensor], bits: int) -> Tensor:
    """The value of the limbs' exact sums; 0.0 in front turns a sum of -0.0 into an integer's plain zero."""
    value = 0.0 + sums[0]
    return value + sums[1] * 2.0**-bits if len(sums) == 2 else value


# ---- the plain formulas in float64


def project_float64(
    delta: Tensor, seed: int, K: int, *, basis: str = "rademacher", offset: int = 0, numel: int | None = None
) -> Tensor:
    """V^T delta / (rho K) as written: float64 [K]."""
    x = _flat_float64(delta)
    d = len(x) if numel is None else numel
    columns = _columns_float64(seed, basis, offset, len(x), d, K)
    return torch.cat([v @ x for v in columns]) * (d / KINDS[basis].variance / K)


def reconstruct_float64(
    gamma: Tensor,
    seed: int,
    shape: Sequence[int],
    *,
    basis: str = "rademacher",
    offset: int = 0,
    numel: int | None = None,
) -> Tensor:
    """V gamma as written: float64 of the given shape."""
    count = math.prod(shape)
    columns = _columns_float64(seed, basis, offset, count, count if numel is None else numel, gamma.numel())
    parts = zip(
        _flat_float64(gamma).tensor_split(list(range(GROUP, gamma.numel(), GROUP))), columns, strict=True
    )
    return torch.stack([g @ v for g, v in parts]).sum(0).view(tuple(shape))


def _columns_float64(seed: int, basis: str, offset: int, count: int, d: int, K: int) -> Iterator[Tensor]:
    """V^T, 64 rows at a time."""
    for k in range(0, K, GROUP):
        b = integers(seed, basis, offset, count, range(k, min(k + GROUP, K)))
        yield b * (2.0 ** -KINDS[basis].exponent / math.sqrt(d))
