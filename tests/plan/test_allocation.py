"""How K is shared out among blocks."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ferret_ext import BlockPlan

SIZES = (1000, 10, 500, 490)


def plan_of(sizes: tuple[int, ...] = SIZES, K: int = 200) -> BlockPlan:
    return BlockPlan.from_parameters(
        [(f"p{i}", torch.ones(n, requires_grad=True)) for i, n in enumerate(sizes)], K
    )


def shares(plan: BlockPlan) -> list[int]:
    return [block.k for block in plan.blocks]


def test_allocation_size_is_proportional_to_elements() -> None:
    assert shares(plan_of()) == [100, 1, 50, 49]


def test_allocation_equal_gives_the_remainder_to_the_first_blocks() -> None:
    assert shares(plan_of().with_allocation("equal", K=10)) == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("allocation", "weight"),
    [
        ("norm", lambda norm, d: norm),
        ("sqrt-norm", lambda norm, d: math.sqrt(norm)),
        ("mse", lambda norm, d: norm * math.sqrt(d)),
        ("curvature", lambda norm, d: norm**1.5 * d**0.25),
    ],
)
def test_allocation_by_norms_is_proportional_to_its_weight(allocation: str, weight) -> None:
    norms = (3.0, 0.5, 2.0, 8.0)
    got = shares(plan_of().with_allocation(allocation, K=100000, norms=norms))
    weights = [weight(norm, d) for norm, d in zip(norms, SIZES, strict=True)]
    assert sum(got) == 100000
    assert got == pytest.approx([100000 * w / sum(weights) for w in weights], abs=1)


def test_allocation_takes_norms_when_a_plan_is_made() -> None:
    named = [(f"p{i}", torch.ones(n, requires_grad=True)) for i, n in enumerate(SIZES)]
    plan = BlockPlan.from_parameters(named, 100, allocation="norm", norms=[1, 1, 2, 4])
    assert plan == plan_of().with_allocation("norm", K=100, norms=[1.0, 1.0, 2.0, 4.0])


def test_allocation_keeps_k_and_everything_else_of_the_plan() -> None:
    plan = plan_of()
    other = plan.with_allocation("equal")
    assert other.K == plan.K
    assert other.tensors == plan.tensors
    assert [(b.name, b.offset, b.numel) for b in other.blocks] == [
        (b.name, b.offset, b.numel) for b in plan.blocks
    ]


@pytest.mark.parametrize("allocation", ["norm", "sqrt-norm", "mse", "curvature"])
def test_allocation_of_all_zero_norms_is_equal(allocation: str) -> None:
    """With no update there is nothing to tell blocks apart by."""
    got = plan_of().with_allocation(allocation, K=10, norms=[0.0] * 4)
    assert shares(got) == shares(plan_of().with_allocation("equal", K=10))


def test_allocation_gives_blocks_of_zero_norm_one_coordinate() -> None:
    assert shares(plan_of().with_allocation("norm", K=10, norms=[0.0, 0.0, 1.0, 1.0])) == [1, 1, 4, 4]


def test_allocation_survives_norms_at_the_ends_of_the_range() -> None:
    for scale in (1e-320, 1e-300, 1e300, 1e308):
        got = plan_of().with_allocation("mse", K=1000, norms=[scale, scale, scale, scale])
        assert shares(got) == shares(plan_of().with_allocation("mse", K=1000, norms=[1.0] * 4))
    assert shares(plan_of().with_allocation("norm", K=7, norms=[1e308, 1e-308, 0.0, 1e308])) == [3, 1, 1, 2]


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=20)


@given(weights, st.integers(0, 10**7))
def test_allocation_sums_to_k_and_gives_every_block_its_share(norms: list[float], spare: int) -> None:
    """Exactly K in all, at least 1 each, never more than one coordinate from the exact share of what the
    blocks that got more than 1 have among themselves."""
    K = len(norms) + spare
    got = shares(plan_of((5,) * len(norms), len(norms)).with_allocation("norm", K=K, norms=norms))
    assert sum(got) == K
    assert min(got) >= 1
    large = [(k, Fraction(norm)) for k, norm in zip(got, norms, strict=True) if k > 1]
    if any(norms) and large:
        left = K - (len(got) - len(large))
        total = sum(norm for _, norm in large)
        assert all(abs(k - left * norm / total) < 1 + Fraction(K, 2**40) for k, norm in large)


@given(weights, st.integers(0, 1000), st.randoms())
def test_allocation_of_a_larger_norm_is_never_smaller(norms: list[float], spare: int, random) -> None:
    K = len(norms) + spare
    got = shares(plan_of((5,) * len(norms), len(norms)).with_allocation("norm", K=K, norms=norms))
    pairs = sorted(zip(norms, got, strict=True))
    assert all(k <= other for (norm, k), (larger, other) in pairwise(pairs) if norm < larger)


def test_allocation_at_k_equal_to_the_number_of_blocks_gives_one_each() -> None:
    assert shares(plan_of(K=4)) == [1, 1, 1, 1]
