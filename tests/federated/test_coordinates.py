"""Coordinates in few bits: sizes, layout, errors within bounds, and means that are right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ferret_ext
from ferret_ext.federated import coordinates, wire
from ferret_ext.federated.coordinates import BITS, KINDS
from ferret_ext.federated.wire import Message, WireError


def plan_of(*counts: int) -> ferret_ext.BlockPlan:
    """A plan of blocks of 600 elements with these K_l."""
    named = [(f"p{i}", nn.Parameter(torch.zeros(600))) for i in range(len(counts))]
    return ferret_ext.BlockPlan.from_parameters(named, len(counts)).with_counts(counts)


def through_a_message(gammas: Any, plan: ferret_ext.BlockPlan, kind: Any, seed: int = 1) -> Any:
    values = coordinates.write(np.asarray(gammas, np.float32), plan, kind, seed)
    message = Message("ferret", "update", bytes(8), 1, values=values)
    return coordinates.read(wire.decode(wire.encode(message)), plan, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_as_documented(kind: Any) -> None:
    plan = plan_of(5, 8)
    values = coordinates.write(np.ones(13, np.float32), plan, kind, 0)
    gammas = values["gammas"]
    assert isinstance(gammas, np.ndarray)
    expected = {"float32": 52, "float16": 26}.get(kind) or math.ceil(13 * BITS[kind] / 8)
    assert gammas.nbytes == expected
    assert ("scales" in values) == (kind != "float32")


def test_codes_stand_one_after_the_other_from_the_lowest_bits_on() -> None:
    """Levels -3, -1, 1, 3 are codes 0 to 3; a scale of 2 and coordinates on the levels leave no chance."""
    values = coordinates.write(np.array([-6, -2, 2, 6, 6], np.float32), plan_of(5), "int2", 0)
    assert values["gammas"].tolist() == [0b11_10_01_00, 0b11]  # type: ignore[union-attr]
    assert values["scales"].tolist() == [2]  # type: ignore[union-attr]
    signs = coordinates.write(np.array([-1, 2, -3, 4, 5, 6, 7, 8, -9], np.float32), plan_of(9), "int1", 0)
    assert signs["gammas"].tolist() == [0b11111010, 0]  # type: ignore[union-attr]
    assert signs["scales"].tolist() == pytest.approx([math.pi / 2 * 5])  # type: ignore[union-attr]


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=7, max_size=7),
    st.sampled_from([kind for kind in KINDS if kind != "int1"]),
    st.integers(0, 2**64 - 1),
)
def test_errors_are_below_one_step(gammas: list[float], kind: Any, seed: int) -> None:
    """A step is twice the scale, the block's largest magnitude over the largest level."""
    plan = plan_of(3, 4)
    got = through_a_message(gammas, plan, kind, seed)
    exact = np.array(gammas, np.float32)
    for part in (slice(0, 3), slice(3, 7)):
        largest = np.abs(exact[part]).max()
        step = {"float32": 0, "float16": 2**-10}.get(kind, 2 / (2 ** BITS.get(kind, 1) - 1))
        assert (np.abs(got[part].astype(float) - exact[part]) <= 1.001 * step * largest + 1e-37).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_random_rounding_is_unbiased(kind: Any) -> None:
    """Within 5 standard errors; one draw's deviation is at most a scale."""
    plan, count = plan_of(64), 2000
    gammas = np.random.default_rng(0).normal(size=64).astype(np.float32)
    mean = np.mean([through_a_message(gammas, plan, kind, seed) for seed in range(count)], axis=0)
    scale = np.abs(gammas).max() / (2 ** BITS[kind] - 1)
    assert np.abs(mean - gammas).max() < 5 * scale / math.sqrt(count)


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_are_unbiased_over_bases(kind: Any) -> None:
    """The mean over many seeds tends to delta; its error falls as 1 / sqrt(seeds), with no floor above it."""
    plan, count = plan_of(128), 400
    torch.manual_seed(0)
    delta = torch.randn(600)
    total = torch.zeros(600)
    for seed in range(count):
        gammas = ferret_ext.project_difference(plan, [delta], [torch.zeros(600)], seed).numpy()
        got = torch.from_numpy(through_a_message(gammas, plan, kind, seed))
        ferret_ext.apply_(plan, [total], [(seed, got, 1.0 / count)], 1.0)
    along = float(total @ delta / delta.square().sum())
    noise = 2.0 if kind == "int2" else 1.3  # of the coordinates' own rounding, beside the projection's
    assert abs(along - 1) < 0.05
    assert (total - delta).norm() / delta.norm() < 1.2 * noise * math.sqrt(600 / 128 / count)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Any) -> None:
    got = through_a_message(np.zeros(9), plan_of(4, 5), kind)
    assert (got == 0).all()


def message_of(kind: Any, **changed: Any) -> Message:
    values = coordinates.write(np.ones(13, np.float32), plan_of(5, 8), kind, 0)
    return Message("ferret", "update", bytes(8), 1, 2, values={**values, **changed})


@pytest.mark.parametrize(
    ("kind", "changed", "expected"),
    [
        (
            "int4",
            {"gammas": np.zeros(8, np.uint8)},
            r"gammas as uint8 of shape \[7\], got uint8 of shape \[8\]",
        ),
        ("int4", {"gammas": np.zeros(7, np.int8)}, r"gammas as uint8 of shape \[7\], got int8"),
        ("int4", {"scales": np.zeros(3, np.float32)}, r"scales as float32 of shape \[2\], got"),
        ("int4", {"scales": np.array([1, -1], np.float32)}, "must have scales >= 0, got -1"),
        ("int4", {"scales": np.array([1, 3e38], np.float32)}, "must have finite coordinates"),
        ("float16", {"gammas": np.zeros(13, np.float32)}, r"gammas as float16 of shape \[13\], got float32"),
        ("float32", {"gammas": np.zeros(12, np.float32)}, r"gammas as float32 of shape \[13\], got"),
    ],
)
def test_what_does_not_fit_is_named(kind: Any, changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(WireError, match=f"client 2's update must have {expected}|{expected}"):
        coordinates.read(message_of(kind, **changed), plan_of(5, 8), kind)
