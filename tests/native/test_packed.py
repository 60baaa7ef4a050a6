"""pack, unpack and apply_ on packed coordinates, against a few lines of numpy and the operators on floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BASES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, Packed, Packing

NUMELS = (3000, 5, 700, 2048)
COUNTS = (70, 1, 3, 150)
PACKINGS = [Packing(1), Packing(2), Packing(4), Packing(8), Packing(1, 1), Packing(1, 5), Packing(1, 8)]
STEPS = {1: 0.995687, 2: 0.995687, 4: 0.335201, 8: 0.030762}


def plan_of(numels: tuple[int, ...] = NUMELS, counts: tuple[int, ...] = COUNTS) -> BlockPlan:
    named = [(f"p{i}", torch.zeros(numel).requires_grad_()) for i, numel in enumerate(numels)]
    return BlockPlan.from_parameters(named, len(numels)).with_counts(counts)


def parameters(seed: int, *dtypes: torch.dtype) -> list[Tensor]:
    return [normal(numel, seed + i, dtypes[i % len(dtypes)]) for i, numel in enumerate(NUMELS)]


def packed_by_numpy(gammas: Any, plan: BlockPlan, packing: Packing) -> tuple[list[int], list[float]]:
    """Codes as whole numbers, and scales."""
    codes, scales, at = [], [], 0
    for block in plan.blocks:
        part = np.asarray(gammas[at : at + (block.k << packing.choice)], np.float64).reshape(block.k, -1)
        at += part.size
        chosen = np.abs(part).argmax(1)
        x = part[np.arange(block.k), chosen]
        step, top = STEPS[packing.bits] * math.sqrt((part**2).mean()), 2**packing.bits - 1
        places = np.floor(x / step) + 2 ** (packing.bits - 1) if step else np.full(block.k, top // 2 + 1)
        level = places.clip(0, top).astype(int)
        product = ((2 * level - top) * x).sum()
        scales.append(float(np.float32((part**2).sum() / product)) if product > 0 else 0.0)
        codes += (chosen << packing.bits | level).tolist()
    return codes, scales


def as_bytes(codes: list[int], width: int) -> list[int]:
    """The codes one after the other as one number, the first in its lowest bits."""
    number = sum(code << (width * i) for i, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * width + 7) // 8, "little"))


def dense(plan: BlockPlan, packed: Packed) -> Tensor:
    """The floats of all candidates that packed coordinates stand for."""
    values, columns = ferret_ext.unpack(plan, packed)
    full = packed.packing.candidates(plan)
    result = torch.zeros(full.K)
    for block, start, first in zip(plan.blocks, plan.starts, full.starts, strict=True):
        run = slice(start, start + block.k)
        result[first + columns[run]] = values[run]
    return result


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_codes_and_scales_are_as_documented(packing: Packing) -> None:
    plan = plan_of()
    gammas = normal(plan.K << packing.choice, 3)
    packed = ferret_ext.pack(plan, gammas, packing)
    codes, scales = packed_by_numpy(gammas, plan, packing)
    assert packed.codes.tolist() == as_bytes(codes, packing.width)
    assert packed.scales.tolist() == pytest.approx(scales, rel=1e-6)
    assert packed.codes.numel() == packing.code_bytes(plan.K)


def test_codes_in_bytes_by_hand() -> None:
    """Levels -3, -1, 1, 3 are codes 0 to 3; of four candidates the third is the largest, and negative."""
    plan = plan_of((100,), (5,))
    levels = ferret_ext.pack(plan, torch.tensor([-3.0, -1, 1, 3, 3]), Packing(2))
    assert levels.codes.tolist() == [0b11_10_01_00, 0b11]
    assert levels.scales.tolist() == [1.0]
    chosen = ferret_ext.pack(plan_of((100,), (1,)), torch.tensor([0.5, 1, -4, 0]), Packing(1, 2))
    assert chosen.codes.tolist() == [0b10_0]
    assert chosen.scales.tolist() == [(0.25 + 1 + 16) / 4]


@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=16, max_size=16),
    st.sampled_from([Packing(1), Packing(2), Packing(4), Packing(8), Packing(1, 1), Packing(1, 3)]),
)
def test_the_inner_product_is_kept(values: list[float], packing: Packing) -> None:
    """sum gamma read = sum gamma^2 in every block, to the rounding of the scale."""
    count = 16 >> packing.choice
    plan = plan_of((600, 600), (1, count - 1) if count > 1 else (1, 1))
    gammas = torch.tensor(values)[: plan.K << packing.choice]
    gammas = torch.nn.functional.pad(gammas, (0, (plan.K << packing.choice) - len(gammas)), value=1.0)
    read = dense(plan, ferret_ext.pack(plan, gammas, packing)).double()
    full = packing.candidates(plan)
    for got, exact in zip(full.split(read), full.split(gammas.double()), strict=True):
        assert float(got @ exact) == pytest.approx(float(exact @ exact), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("packing", PACKINGS[:4], ids=str)
def test_apply_on_levels_is_apply_on_the_floats(isa: str, packing: Packing, basis: Any) -> None:
    plan = plan_of()
    updates = [(seed, ferret_ext.pack(plan, normal(plan.K, seed), packing), 0.3 + seed) for seed in (0, 1, 2)]
    got = parameters(1, torch.float32, torch.bfloat16, torch.float16)
    expected = [param.clone() for param in got]
    ferret_ext.apply_(plan, got, updates, -0.7, basis=basis)
    floats = [(seed, ferret_ext.unpack(plan, packed)[0], weight) for seed, packed, weight in updates]
    ferret_ext.apply_(plan, expected, floats, -0.7, basis=basis)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("packing", PACKINGS[4:], ids=str)
def test_apply_on_chosen_columns_is_their_sum(
    isa: str, packing: Packing, basis: Any, dtype: torch.dtype
) -> None:
    """To rounding, of the columns in float64; and as apply_ on the floats of all candidates."""
    plan = plan_of()
    full = packing.candidates(plan)
    packed = ferret_ext.pack(plan, normal(full.K, 9), packing)
    got = [torch.zeros(numel, dtype=dtype) for numel in NUMELS]
    ferret_ext.apply_(plan, got, [(77, packed, 1.0)], 1.0, basis=basis)
    other = [param.clone() for param in got]
    if packing.choice < 8:  # the plain path takes its time
        other = [torch.zeros(numel, dtype=dtype) for numel in NUMELS]
        ferret_ext.apply_(full, other, [(77, dense(plan, packed), 1.0)], 1.0, basis=basis)
    values, columns = ferret_ext.unpack(plan, packed)
    for i, (block, start) in enumerate(zip(plan.blocks, plan.starts, strict=True)):
        exact = torch.zeros(block.numel, dtype=torch.float64)
        for k in range(start, start + block.k):
            column = ferret_ext.basis(
                77,
                int(columns[k]),
                block.numel,
                basis=basis,
                offset=block.offset,
                numel=block.numel,
                dtype=torch.float64,
            )
            exact += values[k].double() * column
        tolerance = 1e-6 * float(exact.norm())
        assert (got[i].double() - exact).norm() <= tolerance
        assert (other[i].double() - got[i].double()).norm() <= tolerance


def test_all_paths_and_threads_give_the_same_bits(restored_threads: None) -> None:
    plan, packing = plan_of(), Packing(1, 8)
    updates = [(seed, ferret_ext.pack(plan, normal(plan.K << 8, seed), packing), 1.0) for seed in (5, 6)]
    results = []
    before = ferret_ext.cpu_capability()["isa"]
    try:
        for isa in ferret_ext.cpu_capability()["available"]:
            for threads in (1, 3):
                ferret_ext.set_cpu_isa(isa)
                torch.set_num_threads(threads)
                params = parameters(1, torch.float32)
                ferret_ext.apply_(plan, params, updates, 1.0)
                results.append(torch.cat(params))
    finally:
        ferret_ext.set_cpu_isa(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_reconstructions_are_unbiased_over_bases(packing: Packing) -> None:
    """The mean over many seeds tends to delta, its error falling as 1 / sqrt(seeds) with no floor above it.

    The error of one is what docs/quality.md derives: d / (K share) of the update's square.
    """
    d, k, seeds = 600, 64, 400
    plan = plan_of((d,), (k,))
    delta, total, squares = normal(d, 1), torch.zeros(d), 0.0
    for seed in range(seeds):
        gammas = ferret_ext.project_difference(packing.candidates(plan), [delta], [torch.zeros(d)], seed)
        rebuilt = torch.zeros(d)
        ferret_ext.apply_(plan, [rebuilt], [(seed, ferret_ext.pack(plan, gammas, packing), 1.0)], 1.0)
        total += rebuilt / seeds
        squares += float(rebuilt.square().sum() / delta.square().sum()) / seeds
    expected = 1 + d / (k * share(packing))
    assert squares == pytest.approx(expected, rel=0.06)
    assert float(total @ delta / delta.square().sum()) == pytest.approx(1, abs=0.05)
    assert (total - delta).norm() / delta.norm() < 1.2 * math.sqrt((expected - 1) / seeds)


def share(packing: Packing) -> float:
    """What a coordinate is worth beside an exact one: E[Q x]^2 / E[Q^2], x the largest of the candidates."""
    draws = np.abs(np.random.default_rng(0).normal(size=(20000, 2**packing.choice))).max(1)
    top = 2**packing.bits - 1
    levels = 2 * np.floor(draws / STEPS[packing.bits]).clip(0, top // 2) + 1
    if packing.bits == 1:
        levels = np.ones_like(draws)
    return float((levels * draws).mean() ** 2 / (levels**2).mean())


def test_zeros_stay_zeros() -> None:
    for packing in PACKINGS:
        packed = ferret_ext.pack(plan_of(), torch.zeros(plan_of().K << packing.choice), packing)
        assert packed.scales.tolist() == [0.0] * 4


def blank(**changed: Any) -> Packed:
    fields = {"codes": torch.zeros(28, dtype=torch.uint8), "scales": torch.ones(4), "packing": Packing(1)}
    return Packed(**{**fields, **changed})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Packing(3), ValueError, "bits must be one of"),
        (
            lambda: Packing(1, 17),
            ValueError,
            r"choice must be an int in \[0, 16\] for levels of 1 bits, got 17",
        ),
        (lambda: Packing(2, 1), ValueError, r"choice must be an int in \[0, 0\] for levels of 2 bits, got 1"),
        (lambda: blank(codes=torch.zeros(28)), TypeError, r"codes must be a torch.uint8 tensor"),
        (lambda: blank(scales=torch.ones(2, 2)), TypeError, r"scales must be a torch.float32 tensor of one"),
        (
            lambda: apply(blank(codes=torch.zeros(29, dtype=torch.uint8))),
            ValueError,
            "codes .* length 28, got 29",
        ),
        (lambda: apply(blank(scales=torch.ones(3))), ValueError, "scales .* length 4, got 3"),
        (lambda: apply(blank(scales=torch.tensor([1.0, -1, 1, 1]))), ValueError, r"must be >= 0, got -1"),
        (lambda: apply(blank(scales=torch.tensor([1.0, math.nan, 1, 1]))), ValueError, "must be finite"),
        (
            lambda: apply(blank(), torch.zeros(224)),
            ValueError,
            "all be tensors or all Packed with one packing",
        ),
        (lambda: ferret_ext.pack(plan_of(), torch.zeros(7), Packing(1)), ValueError, "the 224 of .*, got 7"),
        (
            lambda: ferret_ext.pack(plan_of(), torch.full((224,), math.inf), Packing(1)),
            ValueError,
            "gammas must be finite",
        ),
        (
            lambda: ferret_ext.unpack(plan_of(), torch.zeros(224)),
            TypeError,
            "packed must be Packed, got Tensor",
        ),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def apply(*gammas: Packed | Tensor) -> None:
    params = parameters(1, torch.float32)
    before = [param.clone() for param in params]
    try:
        ferret_ext.apply_(plan_of(), params, [(0, each, 1.0) for each in gammas], 1.0)
    finally:
        for param, expected in zip(params, before, strict=True):
            assert_same_bits(param, expected)
