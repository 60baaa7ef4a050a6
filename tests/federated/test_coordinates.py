"""Coordinates in messages: sizes, layout, errors within bounds, and means that are right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ferret_ext
from ferret_ext.federated import coordinates, wire
from ferret_ext.federated.coordinates import KINDS, PACKINGS, SHARES
from ferret_ext.federated.wire import Message, WireError


def plan_of(*counts: int) -> ferret_ext.BlockPlan:
    """A plan of blocks of 600 elements with these K_l."""
    named = [(f"p{i}", nn.Parameter(torch.zeros(600))) for i in range(len(counts))]
    return ferret_ext.BlockPlan.from_parameters(named, len(counts)).with_counts(counts)


def through_a_message(gammas: Any, plan: ferret_ext.BlockPlan, kind: Any) -> Any:
    values = coordinates.write(torch.as_tensor(gammas, dtype=torch.float32), plan, kind)
    message = Message("ferret", "update", bytes(8), 1, values=values)
    return coordinates.read(wire.decode(wire.encode(message)), plan, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_as_documented(kind: Any) -> None:
    plan = plan_of(5, 8)
    values = coordinates.write(torch.ones(coordinates.candidates(plan, kind).K), plan, kind)
    gammas = values["gammas"]
    assert isinstance(gammas, np.ndarray)
    bits = {"float32": 32, "float16": 16}.get(kind) or PACKINGS[kind].width
    assert gammas.nbytes == math.ceil(13 * bits / 8)
    assert list(values) == coordinates.names(kind)
    blank = coordinates.blank(plan, kind)
    assert {name: np.shape(value) for name, value in blank.items()} == {  # type: ignore[arg-type]
        name: np.shape(value)
        for name, value in values.items()  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("kind", PACKINGS)
def test_packed_coordinates_are_those_of_pack_but_for_the_scales(kind: Any) -> None:
    """Scales are off by 1/64 of an octave's lower end at most: 1/34."""
    plan, packing = plan_of(50, 9, 1), PACKINGS[kind]
    gammas = torch.randn(60 << packing.choice, generator=torch.Generator().manual_seed(3)) * 1e-3
    expected = ferret_ext.pack(plan, gammas, packing)
    got = through_a_message(gammas, plan, kind)
    assert torch.equal(got.codes, expected.codes)
    assert got.packing == packing
    assert ((got.scales / expected.scales - 1).abs() <= 1 / 33).all()
    assert got.scales.max() == expected.scales.max()
    assert np.array_equal(coordinates.values(plan, got), ferret_ext.unpack(plan, got)[0].numpy())


def test_scales_stand_for_the_nearest_share_of_the_largest() -> None:
    assert SHARES[:3].tolist() == [1, 31 / 32, 30 / 32]
    assert SHARES[15:17].tolist() == [17 / 32, 1 / 2]
    assert SHARES[254:].tolist() == [18 / 2**20, 0]
    scales = [8.0, 8 * 31 / 32 + 0.1, 4.0, 8 * 17.4 / 32, 8 * 2.0**-16, 1e-30, 0.0]
    plan = plan_of(*[1] * len(scales))
    values = coordinates.write(torch.tensor(scales), plan, "int1")
    assert values["unit"] == 8
    got = SHARES[values["scales"]] * 8  # type: ignore[index]
    nearest = [min(SHARES * np.float32(8), key=lambda share: abs(float(share) - scale)) for scale in scales]
    assert got.tolist() == nearest


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=7, max_size=7))
def test_float16_is_off_by_2_to_the_minus_11_of_the_largest(gammas: list[float]) -> None:
    plan, exact = plan_of(3, 4), np.array(gammas, np.float32)
    got = through_a_message(gammas, plan, "float16").numpy()
    for part in (slice(0, 3), slice(3, 7)):
        largest = np.abs(exact[part]).max()
        assert (np.abs(got[part].astype(float) - exact[part]) <= 1.001 * 2**-11 * largest + 1e-37).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Any) -> None:
    plan = plan_of(4, 5)
    got = through_a_message(torch.zeros(coordinates.candidates(plan, kind).K), plan, kind)
    assert (coordinates.values(plan, got) == 0).all()


def message_of(kind: Any, **changed: Any) -> Message:
    plan = plan_of(5, 8)
    values = coordinates.write(torch.ones(coordinates.candidates(plan, kind).K), plan, kind)
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
        ("int4", {"scales": np.zeros(3, np.uint8)}, r"scales as uint8 of shape \[2\], got"),
        ("int4", {"unit": -1.0}, r"must have a unit in \[0, 2.1\d+e\+37\], got -1"),
        ("choice8", {"unit": 3e38}, r"must have a unit in \[0, 1.7\d+e\+38\], got 3e\+38"),
        ("float16", {"scales": np.array([1, -1], np.float32)}, "must have scales >= 0, got -1"),
        ("float16", {"scales": np.array([1, 3.4e38], np.float32)}, "must have finite coordinates"),
        ("float16", {"gammas": np.zeros(13, np.float32)}, r"gammas as float16 of shape \[13\], got float32"),
        ("float32", {"gammas": np.zeros(12, np.float32)}, r"gammas as float32 of shape \[13\], got"),
    ],
)
def test_what_does_not_fit_is_named(kind: Any, changed: dict[str, Any], expected: str) -> None:
    if kind == "float16" and "must have finite" in expected:
        changed = {**changed, "gammas": np.full(13, 2, np.float16)}
    with pytest.raises(WireError, match=f"client 2's update must have {expected}|{expected}"):
        coordinates.read(message_of(kind, **changed), plan_of(5, 8), kind)


def test_floats_are_tensors_and_the_others_packed() -> None:
    plan = plan_of(5, 8)
    for kind in KINDS:
        got = coordinates.read(message_of(kind), plan, kind)
        assert isinstance(got, Tensor) == (kind in ("float32", "float16"))
