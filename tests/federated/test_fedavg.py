"""FedAvg's rounds against a few lines of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from federation import (
    Federation,
    assert_only_the_first_is_refused,
    federate,
    flat,
    locally_trained,
    toy,
    train,
)
from torch import Tensor, nn

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.fedavg import FedAvg


def federation(step: float = 1.0, model: nn.Module | None = None) -> Federation:
    return federate(FedAvg(step, train), model)


def mean_of_weights(start: nn.Module, round_: int, weights: list[float], step: float) -> Tensor:
    """w - step * sum_i p_i (w - w_i), in float64, trained anew here."""
    trained = torch.stack(
        [flat(locally_trained(start, client, round_).parameters()) for client in range(len(weights))]
    )
    mean = torch.tensor(weights, dtype=torch.float64) @ trained / sum(weights)
    before = flat(start.parameters())
    return before - step * (before - mean)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [5.0, 1.0, 2.0]])
@pytest.mark.parametrize("step", [1.0, 0.3])
def test_two_rounds_are_the_weighted_means_of_the_clients_models(weights: list[float], step: float) -> None:
    fed, start = federation(step), toy()
    for round_ in (1, 2):
        expected = mean_of_weights(start, round_, weights, step)
        fed.round(weights)
        got = flat(fed.server.replica.params)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert (got - flat(start.parameters())).norm() > 0.01
        nn.utils.vector_to_parameters(got.float(), start.parameters())


def test_one_client_with_step_1_gives_its_own_weights() -> None:
    fed = federation()
    fed.round([1.0])
    expected = flat(locally_trained(toy(), 0).parameters())
    torch.testing.assert_close(flat(fed.server.replica.params), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_clients_and_server_hold_the_same_bits(dtype: torch.dtype) -> None:
    """Messages are in the parameters' dtype, and the mean is float32's, rounded once."""
    fed = federation(model=toy().to(dtype))
    messages = fed.round()
    size = sum(param.numel() for param in fed.client.params)
    assert all(0 < len(message) - size * fed.client.params[0].element_size() < 200 for message in messages)
    start = toy().to(dtype)
    deltas = [
        [p - q for p, q in zip(start.parameters(), locally_trained(start, i).parameters(), strict=True)]
        for i in range(3)
    ]
    expected = flat(start.parameters()) - torch.stack([flat(delta) for delta in deltas]).mean(0)
    got = flat(fed.server.replica.params)
    torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    for _ in range(2):
        fed.round()
    fed.catch_up()
    assert torch.equal(flat(fed.client.params), flat(fed.server.replica.params))


def test_a_client_that_comes_late_needs_the_last_broadcast_only() -> None:
    fed = federation()
    for _ in range(3):
        fed.round()
    assert len(fed.server.broadcasts) == 4
    assert [bool(broadcast) for broadcast in fed.server.broadcasts] == [True, False, False, True]
    late = fed.algorithm.replicate(toy())
    for broadcast in fed.server.broadcasts_since(0):
        fed.algorithm.rebuild(late, broadcast)
    assert late.round == 3
    assert torch.equal(flat(late.params), flat(fed.server.replica.params))


def test_frozen_parameters_neither_travel_nor_change() -> None:
    model = toy()
    frozen = model[0].weight.requires_grad_(False)
    before = frozen.clone()
    fed = federation(model=model)
    (message, *_) = fed.round()
    assert [value.size for value in wire.decode(message).values.values()] == [7, 21, 3]
    assert torch.equal(frozen, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": {}}, "fedavg: expected 4 tensors, got 0"),
        ({"0": torch.zeros(62).numpy()}, r"0 as float32 of shape \[63\], got float32 of shape \[62\]"),
        ({"0": torch.zeros(63).double().numpy()}, r"got float64 of shape \[63\]"),
        ({"0": 1}, "must have 0 as ndarray, got int"),
        ({"digest": bytes(8)}, "must have digest"),
        ({"algorithm": "fedit"}, "must have algorithm fedavg, got fedit"),
    ],
)
def test_server_refuses_what_does_not_fit_and_goes_on_with_the_rest(
    fields: dict[str, Any], message: str
) -> None:
    fed = federation()
    sent = [reply.payload for reply in fed.replies()]
    decoded = wire.decode(sent[0])
    values = {**decoded.values, **{name: fields[name] for name in fields if name.isdigit()}}
    changes = {"values": values, **{name: fields[name] for name in fields if not name.isdigit()}}
    bad = wire.encode(dataclasses.replace(decoded, **changes))
    assert_only_the_first_is_refused(fed.server, [bad, *sent[1:]], message)
