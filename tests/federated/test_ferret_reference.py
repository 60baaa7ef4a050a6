"""Ferret's reference-code mode against a few lines of torch with the bases in memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, data_of, federate, flat, locally_trained, toy, train
from torch import Tensor, nn

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms import ferret_reference
from ferret_ext.federated.algorithms.ferret_reference import FerretReference, chosen_seeds, subset_sizes
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.settings import ConfigError

POOL, K, ROUNDS = 77, 24, 4


def federation(step: float = 2.0, model: nn.Module | None = None, **settings: Any) -> Federation:
    config = FerretConfig(**{"mode": "reference-code", "K": K, **settings})
    return federate(FerretReference(config, step, train, ROUNDS, POOL), model)


def blocks_of(model: nn.Module, granularity: str) -> list[int]:
    """Block lengths: whole parameters (63, 7, 21, 3), or packed up to 0.9 * 14, the median being 14."""
    return {"tensor": [63, 7, 21, 3], "packed": [63, 28, 3]}[granularity]


def bases(lengths: list[int], basis: Any) -> list[Tensor]:
    """V_l, float64 [d_l, K], blocks beginning at multiples of 512 in the stream."""

    def column(k: int, block: int) -> Tensor:
        return ferret_ext.basis(
            POOL, k, (lengths[block],), basis=basis, offset=512 * block, dtype=torch.float64
        )

    return [torch.stack([column(k, block) for k in range(K)], 1) for block in range(len(lengths))]


def round_by_hand(
    start: nn.Module,
    pool: list[Tensor],
    round_: int,
    weights: list[float],
    V: list[Tensor],
    step: float,
    m: float,
) -> Tensor:
    """The weights after the round, float64; `pool` is changed."""
    lengths = [len(v) for v in V]
    for coefficients in pool:
        coefficients.mul_(m)
    for client, weight in enumerate(weights):
        after = flat(locally_trained(start, client, round_).parameters())
        deltas = (flat(start.parameters()) - after).split(lengths)
        largest = max(delta.norm() for delta in deltas)
        sizes = [max(int(delta.norm() / largest * K), 2) for delta in deltas]
        random = np.random.Generator(np.random.PCG64(derive(data_of(client, round_).seed, "subsets")))
        for v, delta, n, coefficients in zip(V, deltas, sizes, pool, strict=True):
            for k in sorted(random.permutation(K)[:n].tolist()):
                coefficients[k] += weight / sum(weights) * len(delta) / n * (v[:, k] @ delta)
    moved = []
    for v, coefficients in zip(V, pool, strict=True):
        parts = v * coefficients
        norms = parts.norm(dim=0)
        moved.append((parts * (ferret_reference.LARGEST_NORM / norms).clamp(max=1)).sum(1))
    return flat(start.parameters()) - step * torch.cat(moved)


@pytest.mark.parametrize("basis", ["auto", "rademacher", "gaussian"])
@pytest.mark.parametrize("granularity", ["auto", "tensor"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.0]])
@pytest.mark.parametrize("m", [0.0, 0.9])
@pytest.mark.parametrize("limit", [10.0, 0.02])
def test_two_rounds_are_those_of_the_authors_code(
    monkeypatch: pytest.MonkeyPatch,
    basis: str,
    granularity: str,
    weights: list[float],
    m: float,
    limit: float,
) -> None:
    monkeypatch.setattr(ferret_reference, "LARGEST_NORM", limit)
    fed = federation(basis=basis, granularity=granularity, pool_momentum=m)
    start = toy()
    lengths = blocks_of(start, granularity.replace("auto", "packed"))
    V = bases(lengths, basis.replace("auto", "uniform"))
    pool = [torch.zeros(K, dtype=torch.float64) for _ in lengths]
    for round_, step in ((1, 2.0), (2, 1.5)):
        expected = round_by_hand(start, pool, round_, weights, V, step, m)
        fed.round(weights)
        got = flat(fed.server.replica.params)
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)
        assert (got - flat(start.parameters())).norm() > 0.01
        nn.utils.vector_to_parameters(got.float(), start.parameters())
    biggest = max(coefficients.abs().max() for coefficients in pool)
    assert (biggest > limit) == (limit == 0.02)


def test_the_reconstruction_is_a_third_of_the_update_with_the_authors_basis() -> None:
    """In expectation: over 100 pools the mean of w_0 - w_1 is delta / 3, within 5 standard errors."""
    start = flat(toy().parameters())
    delta = start - flat(locally_trained(toy(), 0).parameters())
    draws = []
    for pool in range(100):
        config = FerretConfig(mode="reference-code", K=K, granularity=94)
        fed = federate(FerretReference(config, 1.0, train, ROUNDS, pool))
        fed.round([1.0])
        draws.append(
            (flat(toy().parameters()) - flat(fed.server.replica.params)) @ delta / delta.square().sum()
        )
    ratios = torch.stack(draws)
    assert abs(ratios.mean() - 1 / 3) < 5 * ratios.std() / 100**0.5
    assert ratios.std() / 100**0.5 < 0.05


def test_clients_and_server_hold_the_same_bits_and_pool() -> None:
    fed = federation(pool_momentum=0.9)
    for _ in range(3):
        fed.round()
    fed.catch_up()
    assert torch.equal(flat(fed.client.params), flat(fed.server.replica.params))
    assert np.array_equal(fed.client.pool, fed.server.replica.pool)
    late = fed.algorithm.replicate(toy())
    for broadcast in fed.server.broadcasts:
        fed.algorithm.rebuild(late, broadcast)
    assert torch.equal(flat(late.params), flat(fed.client.params))


def test_the_server_step_falls_as_the_schedule_says() -> None:
    def steps(schedule: str, low: float = 0.0, high: float = 10.0) -> list[float]:
        config = FerretConfig(mode="reference-code", slr_schedule=schedule, slr_min=low)  # type: ignore[arg-type]
        algorithm = FerretReference(config, high, train, ROUNDS, POOL)
        return [algorithm.step(round_) for round_ in range(1, ROUNDS + 1)]

    assert steps("none") == [10.0] * 4
    assert steps("linear") == [10.0, 7.5, 5.0, 2.5]
    assert steps("linear", low=2.0) == [10.0, 8.0, 6.0, 4.0]
    assert steps("cosine") == pytest.approx([5 + 5 * math.cos(math.pi * t / 4) for t in range(4)])
    assert steps("linear", low=3.0, high=1.0) == [1.0] * 4


def test_subset_sizes_follow_the_norms() -> None:
    assert subset_sizes([1.0, 0.5, 0.26, 0.001, 0.0], 10).tolist() == [10, 5, 2, 2, 2]
    assert subset_sizes([0.0, 0.0], 10).tolist() == [2, 2]


def test_chosen_seeds_are_distinct_and_follow_from_the_seed() -> None:
    counts = np.array([3, 10, 2])
    places = chosen_seeds(5, counts, 10)
    assert places.tolist() == chosen_seeds(5, counts, 10).tolist() != chosen_seeds(6, counts, 10).tolist()
    for block, part in enumerate(np.split(places, [3, 13])):
        assert len(set(part.tolist())) == len(part)
        assert ((part >= 10 * block) & (part < 10 * block + 10)).all()
    drawn = np.concatenate([chosen_seeds(seed, np.array([3]), 10) for seed in range(400)])
    assert (abs(np.bincount(drawn, minlength=10) - 120) < 5 * (400 * 0.3 * 0.7) ** 0.5).all()


def test_messages_carry_the_subsets_only() -> None:
    fed = federation()
    message = wire.decode(fed.round()[0])
    assert set(message.values) == {"seed", "counts", "gammas"}
    counts = message.values["counts"]
    assert isinstance(counts, np.ndarray)
    assert message.array("gammas", "<f4", (int(counts.sum()),)).size < 3 * K
    assert wire.decode(fed.server.broadcasts[1]).array("pool", "<f4", (3 * K,)).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": np.array([24, 2, 1], np.uint32)}, r"must have counts in \[2, 24\], got 1"),
        ({"counts": np.array([25, 2, 2], np.uint32)}, r"must have counts in \[2, 24\], got 25"),
        ({"counts": np.array([2, 2], np.uint32)}, "must have counts as uint32"),
        ({"gammas": np.zeros(5, np.float32)}, "must have gammas as float32"),
        ({"contract": 0x10001}, "must have no values but seed, counts, gammas, got contract"),
        ({"seed": -1}, r"must have seed as a whole number in \[0, 2\^64\), got -1"),
    ],
)
def test_server_refuses_values_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    fed = federation()
    sent = wire.decode(fed.replies()[0].payload)
    bad = dataclasses.replace(sent, values={**sent.values, **changed})
    with pytest.raises(QuorumError, match=message):
        fed.apply([wire.encode(bad)])
    assert torch.equal(flat(fed.server.replica.params), flat(toy().parameters()))


def test_a_pool_of_one_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ferret.K: expected at least 2 seeds in the pool, got 1"):
        federation(K=1)
