"""Rounds with coordinates of 16 bits and fewer (`ferret.coordinates`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from federation import assert_only_the_first_is_refused, flat, toy
from ferret_federation import STEP, basis_matrix, changed, federation

import ferret_ext
from ferret_ext.federated import coordinates, wire
from ferret_ext.federated.config import build
from ferret_ext.federated.settings import ConfigError


@pytest.mark.parametrize("seeds", ["per-client", "shared-round"])
@pytest.mark.parametrize("kind", ["float16", "int8", "int4", "int2", "int1", "choice4"])
def test_all_parties_read_coarse_coordinates_alike(kind: Any, seeds: Any) -> None:
    """w_1 = w_0 - step mean_i V_i gamma_i with the coordinates as they came; a late joiner gets there too."""
    if kind == "choice4" and seeds == "shared-round":
        pytest.skip("clients choose columns of their own")
    fed = federation(coordinates=kind, seeds=seeds, allocation="norm")
    plan, start = fed.server.replica.plan, flat(toy().parameters())
    full = coordinates.candidates(plan, kind)
    sent = [wire.decode(message) for message in fed.round()]
    fed.catch_up()
    expected = start
    for update in sent:
        gammas = dense(plan, full, coordinates.read(update, plan, kind)).double()
        moved = [
            basis_matrix(block, update.value("seed", int), "rademacher") @ part
            for block, part in zip(full.blocks, full.split(gammas), strict=True)
        ]
        expected = expected - STEP / 3 * torch.cat(moved)
    got = flat(fed.server.replica.params)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    fed.round()
    late = fed.algorithm.replicate(toy())
    for broadcast in fed.server.broadcasts_since(0):
        fed.algorithm.rebuild(late, broadcast)
    assert torch.equal(flat(late.params), flat(fed.server.replica.params))


def dense(
    plan: ferret_ext.BlockPlan, full: ferret_ext.BlockPlan, gammas: torch.Tensor | ferret_ext.Packed
) -> torch.Tensor:
    """Coordinates on all columns of their bases."""
    if isinstance(gammas, torch.Tensor):
        return gammas
    values, columns = ferret_ext.unpack(plan, gammas)
    starts = [first for block, first in zip(plan.blocks, full.starts, strict=True) for _ in range(block.k)]
    return torch.zeros(full.K).index_put((columns + torch.tensor(starts),), values)


def test_choices_need_seeds_of_the_clients_own() -> None:
    given = [("model", "m"), ("data", "d"), ("out", "o"), ("ferret.seeds", "shared-round")]
    with pytest.raises(ConfigError, match=r"ferret.coordinates: expected floats or levels .* got choice8"):
        build([*given, ("ferret.coordinates", "choice8")])


def test_one_bit_a_coordinate_is_an_eighth_of_a_byte() -> None:
    """Beside 4 blocks' scales and their unit; the header as ever."""
    lengths = {kind: len(federation(K=400, coordinates=kind).round()[0]) for kind in ("float32", "int1")}
    scales = 4 + 7 + 4 + 5 + 9  # values, name, and dtype and length in the head; the unit's name and value
    shorter = 2  # the length of 50 bytes than that of 400 coordinates
    assert lengths["float32"] - lengths["int1"] == 4 * 400 - 400 // 8 - scales + shorter


def test_a_client_of_other_coordinates_is_rejected() -> None:
    fed, sent = federation(), federation().round()
    other = federation(coordinates="int8").round()
    reason = "client 0's update must have no values but contract, seed, gammas, got scales"
    assert_only_the_first_is_refused(fed.server, [other[0], *sent[1:]], reason)
    extra = changed(sent[0])
    decoded = wire.decode(extra)
    values = {**decoded.values, "scales": np.ones(4, np.float32)}
    with_scales = wire.encode(dataclasses.replace(decoded, values=values))
    fed = federation()
    assert_only_the_first_is_refused(
        fed.server, [with_scales, *sent[1:]], "must have no values but contract, seed, gammas, got scales"
    )


@pytest.mark.parametrize(
    ("kind", "most"),
    [("float32", 64), ("float16", 128), ("int8", 64), ("int1", 512), ("choice4", 103), ("choice8", 64)],
)
def test_scales_stay_a_small_share_of_a_block(kind: Any, most: int) -> None:
    """A sixty-fourth of the bits at the most coordinates that auto gives a block."""
    assert coordinates.most_a_block(kind) == most
    if kind in coordinates.PACKINGS:
        assert 8 / (coordinates.PACKINGS[kind].width * most) <= 1 / 64
