"""Known answers of the stream contract: whether a device gives the bits that every other one gives.

`RECORDS` are lines of tests/golden.txt, which says how they are written, with the checksum alone as result;
the ones here are of each operator, basis and size of number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from . import ops
from .plan import Block, BlockPlan

RECORDS = (
    "project f32 rademacher 0 1613 2000 2000 100 3ec : cc14301e919b7406",
    "project f32 uniform ffffffffffffffff 1613 2000 2000 100 3f3 : 375a086b0e7265e9",
    "project f32 gaussian 123456789abcdef 1613 2000 2000 100 3fa : c793251b09add107",
    "project bf16 gaussian ffffffffffffffff 1613 2000 2000 100 40f : 5a7359d06d3bf831",
    "project f64 gaussian 1 1613 2000 2000 100 439 : 4fd514897a03d125",
    "reconstruct f32 rademacher 0 1613 2000 2000 100 7d4 f32 : 0cbb25f631648596",
    "reconstruct f32 uniform ffffffffffffffff 1613 2000 2000 100 7db f32 : 31e46fd67ae53942",
    "reconstruct f32 gaussian 123456789abcdef 1613 2000 2000 100 7e2 f32 : 9d772db12f6ea0b0",
    "reconstruct bf16 gaussian ffffffffffffffff 1613 2000 2000 100 7f7 f32 : 9f6bb41038c6a4a5",
    "reconstruct f64 gaussian 1 1613 2000 2000 100 821 f32 : b313b2f0e9e4bc06",
    "apply f32 rademacher 1536 2000 100 bb8 f32 -0.3 2 "
    "123456789abcdef 0.5 fa0 ffffffffffffffff -0.1 1388 : c29ca28d0cce4aeb",
    "apply bf16 uniform 1536 2000 100 bc8 f32 -0.3 2 "
    "123456789abcdef 0.5 fb0 ffffffffffffffff -0.1 1398 : ecf1eefe90f8aa0d",
    "apply f32 gaussian 1536 2000 100 bc0 f32 -0.3 2 "
    "123456789abcdef 0.5 fa8 ffffffffffffffff -0.1 1390 : 8504fbf622990036",
)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
PRECISION = {"f32": 24, "bf16": 8, "f16": 11, "f64": 53}
SHOWN = 8
_PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def wrong(device: torch.device | str = "cpu") -> list[str]:
    """The records that the operators of this device answer in other bits; none where all is well.

    Raises what the operators raise, e.g. RuntimeError where the device has none.
    """
    return [record for record in RECORDS if answer(record, device).split()[0] != record.split(" : ")[1]]


def answer(record: str, device: torch.device | str = "cpu") -> str:
    """What the operators give for a record's arguments: a checksum and at most the first 8 bit patterns."""
    name, *arguments = record.split(" : ")[0].split()
    return result(_ANSWERS[name](arguments, device))


def inputs(start: int, count: int, dtype: str) -> Tensor:
    """Exact test data, as the header of tests/golden.txt describes it."""
    p, x, values = PRECISION[dtype], start, []
    for _ in range(count):
        x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(((x >> (64 - p)) - 2 ** (p - 1)) * 2.0 ** -(p - 1 + (x >> 5) % 8))
    return torch.tensor(values, dtype=torch.float64).to(DTYPES[dtype])


def result(tensor: Tensor) -> str:
    """Checksum (FNV-1a over whole values) and first values, as hex."""
    size = tensor.element_size()
    patterns = [bits % 2 ** (8 * size) for bits in tensor.flatten().cpu().view(_PATTERN[size]).tolist()]
    checksum = 0xCBF29CE484222325
    for bits in patterns:
        checksum = (checksum ^ bits) * 0x100000001B3 % 2**64
    return " ".join([f"{checksum:016x}", *(f"{bits:0{2 * size}x}" for bits in patterns[:SHOWN])])


def _named(basis: str) -> ops.Basis:
    return cast(ops.Basis, basis)


def _basis(arguments: Sequence[str], device: torch.device | str) -> Tensor:
    dtype, basis, seed = DTYPES[arguments[0]], _named(arguments[1]), int(arguments[2], 16)
    k, offset, numel, count = map(int, arguments[3:])
    place = {"offset": offset, "numel": numel}
    return ops.basis(seed, k, (count,), basis=basis, dtype=dtype, device=device, **place)


def _project(arguments: Sequence[str], device: torch.device | str) -> Tensor:
    dtype, basis, seed = arguments[0], _named(arguments[1]), int(arguments[2], 16)
    offset, numel, count, K = map(int, arguments[3:7])
    delta = inputs(int(arguments[7], 16), count, dtype).to(device)
    return ops.project(delta, seed, K, basis=basis, offset=offset, numel=numel)


def _reconstruct(arguments: Sequence[str], device: torch.device | str) -> Tensor:
    dtype, basis, seed = DTYPES[arguments[0]], _named(arguments[1]), int(arguments[2], 16)
    offset, numel, count, K = map(int, arguments[3:7])
    gamma = inputs(int(arguments[7], 16), K, arguments[8]).to(device)
    return ops.reconstruct(gamma, seed, (count,), basis=basis, dtype=dtype, offset=offset, numel=numel)


def _apply(arguments: Sequence[str], device: torch.device | str, rounding_seed: int | None = None) -> Tensor:
    dtype, basis = arguments[0], _named(arguments[1])
    offset, count, K = map(int, arguments[2:5])
    start, gamma_dtype, alpha = int(arguments[5], 16), arguments[6], float(arguments[7])
    updates = [
        (int(seed, 16), inputs(int(gamma, 16), K, gamma_dtype).to(device), float(weight))
        for seed, weight, gamma in zip(*(arguments[i::3] for i in (9, 10, 11)), strict=True)
    ]
    param = inputs(start, count, dtype).to(device)
    plan = BlockPlan((("param", count),), (Block("param", offset, count, K),))
    with torch.no_grad():
        ops.apply_(plan, [param], updates, alpha, basis=basis, rounding_seed=rounding_seed)
    return param


def _round(arguments: Sequence[str], device: torch.device | str) -> Tensor:
    return _apply(arguments[1:], device, int(arguments[0], 16))


_ANSWERS: dict[str, Callable[[Sequence[str], torch.device | str], Tensor]] = {
    "basis": _basis,
    "project": _project,
    "reconstruct": _reconstruct,
    "apply": _apply,
    "round": _round,
}
