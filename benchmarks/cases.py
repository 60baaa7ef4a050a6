"""What the benchmarks time: calls, and how much each of them makes, reads and writes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

import ferret_ext
from ferret_ext.ops import Basis
from ferret_ext.plan import TILE

SEED = 1
WORDS = {"rademacher": 1 / 32, "uniform": 1 / 4, "gaussian": 1.0}  # of 32 random bits, a basis element


@dataclass(frozen=True)
class Case:
    """A call, which makes numel K basis elements; K is an average over the elements of the tensors."""

    what: str
    call: Callable[[], object]
    numel: int
    K: float
    bytes_read: int = 0
    bytes_written: int = 0
    basis: Basis = "rademacher"
    dtype: str = "float32"

    @property
    def elements(self) -> float:
        return self.numel * self.K

    @property
    def words(self) -> float:
        return self.elements * WORDS[self.basis]


def project_case(delta: Tensor, K: int, basis: Basis = "rademacher") -> Case:
    call = partial(ferret_ext.project, delta, SEED, K, basis=basis)
    return Case("project", call, delta.numel(), K, delta.nbytes, 0, basis, name_of(delta.dtype))


def apply_case(param: Tensor, K: int, basis: Basis = "rademacher") -> Case:
    """The coordinates are so small that param keeps its size over any number of calls."""
    call = partial(ferret_ext.reconstruct_, param, torch.full((K,), 1e-6), SEED, basis=basis)
    size = param.nbytes
    return Case("reconstruct_", call, param.numel(), K, size, size, basis, name_of(param.dtype))


def both_cases(x: Tensor, K: int, basis: Basis = "rademacher") -> tuple[Case, Case]:
    """x as a delta and as a parameter."""
    return project_case(x, K, basis), apply_case(x, K, basis)


def plan_cases(numels: Sequence[int], columns: Sequence[int]) -> tuple[Case, Case]:
    """project_difference and apply_ of one update over a tensor and block of each of these lengths and K."""
    plan = make_plan(numels, columns)
    old, new = filled(sum(numels)), filled(sum(numels)).neg_()
    olds, news = ([part.clone() for part in torch.split(x, list(numels))] for x in (old, new))
    average = sum(d * K for d, K in zip(numels, columns, strict=True)) / sum(numels)
    project = partial(ferret_ext.project_difference, plan, olds, news, SEED)
    apply = partial(ferret_ext.apply_, plan, news, [(SEED, torch.full((plan.K,), 1e-6), 1.0)], 1.0)
    blocks = "one block" if len(numels) == 1 else f"{len(numels)} blocks"
    return (
        Case(f"project_difference, {blocks}", project, old.numel(), average, old.nbytes + new.nbytes),
        Case(f"apply_, {blocks}", apply, old.numel(), average, new.nbytes, new.nbytes),
    )


def make_plan(numels: Sequence[int], columns: Sequence[int]) -> ferret_ext.BlockPlan:
    tensors = tuple((f"tensor {i}", numel) for i, numel in enumerate(numels))
    tiles = (math.ceil(numel / TILE) for numel in numels)
    offsets = [TILE * tile for tile in accumulate(tiles, initial=0)][:-1]
    blocks = map(ferret_ext.Block, (name for name, _ in tensors), offsets, numels, columns)
    return ferret_ext.BlockPlan(tensors, tuple(blocks))


def log_uniform(low: int, high: int, count: int, seed: int) -> list[int]:
    """Integers of every order of magnitude from low to high, the same on every call."""
    draw = random.Random(seed)
    return [round(low * (high / low) ** draw.random()) for _ in range(count)]


def filled(numel: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers that repeat every 2^20 elements: quick to make, and as good to time."""
    period = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x = torch.empty(numel, dtype=dtype, device=device)
    for part in torch.split(x, len(period)):
        part.copy_(period[: len(part)])
    return x


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
