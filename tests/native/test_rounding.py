"""Stochastic rounding of 16-bit parameters in apply_ and reconstruct_."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BASES, assert_same_bits, normal

import ferret_ext
from ferret_ext import BlockPlan, reference
from ferret_ext.ops import Basis
from ferret_ext.plan import Block

NARROW = (torch.bfloat16, torch.float16)
# zeros, the least and the largest numbers and their neighbourhood
EXTREMES = [0.0, -0.0, 1e-45, -6e-8, 5.96e-8, 6.1e-5, 65503.0, 65519.0, 65520.0, 3.3e38, -3.39e38]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", NARROW)
def test_it_is_the_references(isa: str, dtype: torch.dtype, basis: Basis) -> None:
    for offset, count, K in ((0, 1, 1), (3, 1000, 5), (512 * 7, 5000, 70), (2**40 + 5, 300, 1)):
        param, gamma = normal(count, 1, dtype), normal(K, 2)
        got, expected = (
            add(param.clone(), gamma, 3, alpha=0.01, basis=basis, offset=offset, rounding_seed=count)
            for add in (ferret_ext.reconstruct_, reference.reconstruct_)
        )
        assert_same_bits(got, expected)


@given(
    st.sampled_from(NARROW),
    st.lists(
        st.sampled_from(EXTREMES) | st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=40,
    ),
    st.integers(-(2**63), 2**64 - 1),
)
def test_any_number_is_rounded_as_the_reference_does(
    dtype: torch.dtype, values: list[float], rounding_seed: int
) -> None:
    """With d = K = 1 any float32 can be what is rounded; here each is in a block of its own."""
    count, sizes = len(values), tuple((f"p{i}", 1) for i in range(len(values)))
    plan = BlockPlan(sizes, tuple(Block(name, 512 * i, 1, 1) for i, (name, _) in enumerate(sizes)))
    params, expected = ([torch.zeros(1, dtype=dtype) for _ in range(count)] for _ in range(2))
    for add, targets in ((ferret_ext.apply_, params), (reference.apply_, expected)):
        add(plan, targets, [(5, torch.tensor(values), 1.0)], 1.0, rounding_seed=rounding_seed)
    assert_same_bits(torch.cat(params), torch.cat(expected))


@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_is_the_unrounded_result(dtype: torch.dtype) -> None:
    """Where rounding to nearest loses every step: 1 + 2^-13 is 1 in both dtypes."""
    count, seeds = 4096, 64
    delta = torch.full((1,), 2.0**-13 * math.sqrt(count))
    mean = torch.zeros(count, dtype=torch.float64)
    for seed in range(seeds):
        param = torch.ones(count, dtype=dtype)
        mean += ferret_ext.reconstruct_(param, delta, 1, rounding_seed=seed).double() / seeds
    nearest = ferret_ext.reconstruct_(torch.ones(count, dtype=dtype), delta, 1)
    exact = torch.ones(count).double() + ferret_ext.reconstruct(delta, 1, (count,)).double()
    below = torch.finfo(dtype).eps / 2  # the step below 1 is half of that above
    one_rounding = math.sqrt(2.0**-13 * torch.finfo(dtype).eps)  # at most the deviation of one result
    assert (nearest == 1).float().mean() > 0.4
    assert float((mean - exact).mean().abs()) < 5 * one_rounding / math.sqrt(count * seeds)
    assert float((mean - exact).abs().max()) < 7 * one_rounding / math.sqrt(seeds) + below / seeds


def test_parts_have_the_bits_of_the_whole() -> None:
    gamma, whole = normal(9, 1), normal(3000, 2, torch.bfloat16)
    parts = [part.clone() for part in torch.split(whole, [1003, 997, 1000])]
    ferret_ext.reconstruct_(whole, gamma, 4, rounding_seed=-1)
    for part, offset in zip(parts, (0, 1003, 2000), strict=True):
        ferret_ext.reconstruct_(part, gamma, 4, offset=offset, numel=3000, rounding_seed=2**64 - 1)
    assert_same_bits(torch.cat(parts), whole)


def test_packed_coordinates_are_rounded_as_the_floats_they_stand_for() -> None:
    named = [("a", normal(700, 1, torch.float16)), ("b", normal(1500, 2, torch.bfloat16))]
    plan = BlockPlan.from_parameters([(name, p.float().requires_grad_()) for name, p in named], 40)
    packed = ferret_ext.pack(plan, normal(40, 3), ferret_ext.Packing(4))
    floats, _ = ferret_ext.unpack(plan, packed)
    one, other = [p.clone() for _, p in named], [p.clone() for _, p in named]
    ferret_ext.apply_(plan, one, [(1, packed, 1.0)], 0.1, rounding_seed=6)
    ferret_ext.apply_(plan, other, [(1, floats, 1.0)], 0.1, rounding_seed=6)
    for a, b in zip(one, other, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_parameters_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    gamma, param = normal(9, 1), normal(3000, 2, dtype)
    expected = ferret_ext.reconstruct_(param.clone(), gamma, 4)
    assert_same_bits(ferret_ext.reconstruct_(param, gamma, 4, rounding_seed=7), expected)


def test_what_is_wrong_is_said_and_changes_nothing() -> None:
    param, gamma = torch.ones(5, dtype=torch.bfloat16), torch.ones(2)
    for seed in (2**64, -(2**63) - 1, 1.5):
        with pytest.raises((ValueError, TypeError), match="rounding_seed"):
            ferret_ext.reconstruct_(param, gamma, 1, rounding_seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected no rounding_seed where param or gamma requires grad"):
        ferret_ext.reconstruct_(param, gamma.requires_grad_(), 1, rounding_seed=1)
    assert (param == 1).all()
