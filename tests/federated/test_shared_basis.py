"""Rounds whose clients share one basis (`ferret.seeds=shared-round`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, assert_only_the_first_is_refused, deliver, flat, toy
from ferret_federation import SEEDS, changed, federation
from torch import nn

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.config import RobustConfig, build
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError


def shared(**settings: Any) -> Federation:
    return federation(seeds="shared-round", **settings)


def test_a_rounds_clients_share_the_seed_that_was_announced() -> None:
    """And no two rounds do."""
    fed = shared()
    rounds = [[wire.decode(message).value("seed", int) for message in fed.round()] for _ in range(4)]
    announced = [wire.decode(broadcast).value("next_seed", int) for broadcast in fed.server.broadcasts]
    assert rounds == [[seed] * 3 for seed in announced[:4]]
    assert len(set(announced)) == 5


@pytest.mark.parametrize("off", ["another", "the last round's"])
def test_an_update_on_another_basis_is_refused(off: str) -> None:
    fed = shared()
    last = fed.server.replica.next_seed
    fed.round()
    sent = [reply.payload for reply in fed.replies()]
    seed = wire.decode(sent[0]).value("seed", int)
    bad = changed(sent[0], seed=seed + 1 if off == "another" else last)
    assert_only_the_first_is_refused(
        fed.server, [bad, *sent[1:]], f"client 0's update must have seed {seed}, got"
    )


def test_a_shared_broadcast_is_as_long_as_one_update_whatever_the_number_of_clients() -> None:
    lengths = {}
    for seeds in SEEDS:
        for count in (2, 6):
            fed = federation(K=400, seeds=seeds)
            update = fed.round([1.0] * count)[0]
            lengths[seeds, count] = len(fed.server.broadcasts[1]) / len(update)
    assert lengths["shared-round", 2] == lengths["shared-round", 6] == pytest.approx(1, abs=0.02)
    assert lengths["per-client", 6] == pytest.approx(6, abs=0.2)


def test_a_shared_round_weighs_clients() -> None:
    """The coordinates that are relayed are the weighted mean of those that were sent."""
    fed = shared()
    weights = [1.0, 2.0, 5.0]
    sent = [wire.decode(message).values["gammas"] for message in fed.round(weights)]
    relayed = wire.decode(fed.server.broadcasts[1]).values["gammas"]
    np.testing.assert_allclose(relayed, np.average(sent, axis=0, weights=weights), rtol=1e-6)


@pytest.mark.parametrize(("rule", "middle"), [("median", np.median), ("trimmed-mean", np.median)])
def test_a_shared_round_takes_the_middle_of_each_coordinate(rule: Any, middle: Any) -> None:
    """Of three clients the trimmed mean keeps one."""
    fed = shared()
    server = Server(fed.algorithm, toy(), range(3), 1.0, 0, robust=RobustConfig(rule=rule, trim=0.34))
    sent = [reply.payload for reply in fed.replies()]
    assert not deliver(server, sent)
    gammas = [wire.decode(message).values["gammas"] for message in sent]
    relayed = wire.decode(server.broadcasts[1]).values["gammas"]
    np.testing.assert_allclose(relayed, middle(gammas, axis=0), rtol=1e-6)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("restored", [True, False])
def test_a_server_that_is_resumed_goes_on_alike(seeds: str, restored: bool) -> None:
    """From the replica's state and weights, or by the broadcasts; the next plan and seed come along."""
    fed = federation(allocation="norm", seeds=seeds)
    for _ in range(3):
        fed.round()
    old, new = fed.server, Server(fed.algorithm, toy(), range(3), 1.0, 0)
    if restored:
        state = wire.decode(wire.encode(wire.Message("x", "record", bytes(8), 3, values=old.replica.state())))
        weights = [param.detach().clone() for param in old.replica.params]
        for broadcast in old.broadcasts_since(1):
            new.recall(broadcast)
        new.restore(weights, state, old.replica.weights)
    else:
        for broadcast in old.broadcasts[1:]:
            new.replay(broadcast)
    messages = [reply.payload for reply in fed.replies()]
    assert not deliver(old, messages)
    assert not deliver(new, messages)
    assert old.broadcasts == new.broadcasts
    assert old.replica.state().keys() == new.replica.state().keys()
    assert torch.equal(flat(old.replica.params), flat(new.replica.params))


@pytest.mark.parametrize(("alike", "factor"), [(True, 8.0), (False, 1.0)])
def test_noise_averages_out_over_bases_and_not_over_a_shared_one(alike: bool, factor: float) -> None:
    """Mean square error of the mean of 8 updates: 8 times as much on one basis where they are all the same,
    as much where they are at right angles."""
    torch.manual_seed(0)
    count, plan = 8, ferret_ext.BlockPlan.from_parameters([("p", nn.Parameter(torch.zeros(64)))], 16)
    deltas = torch.eye(64)[:1].repeat(count, 1) if alike else torch.eye(64)[:count]
    errors = dict.fromkeys(SEEDS, 0.0)
    for trial in range(400):
        for seeds in SEEDS:
            rebuilt = torch.zeros(64)
            for client, delta in enumerate(deltas):
                seed = 1000 * trial + (0 if seeds == "shared-round" else client + 1)
                gammas = ferret_ext.project_difference(plan, [delta], [torch.zeros(64)], seed)
                ferret_ext.apply_(plan, [rebuilt], [(seed, gammas, 1 / count)], 1.0)
            errors[seeds] += (rebuilt - deltas.mean(0)).square().sum().item() / 400
    assert errors["per-client"] == pytest.approx(63 / 16 / count, rel=0.1)
    assert errors["shared-round"] / errors["per-client"] == pytest.approx(factor, rel=0.15)


def test_seeds_of_the_reference_code_are_its_own() -> None:
    given = [("model", "m"), ("data", "d"), ("out", "o"), ("ferret.mode", "reference-code")]
    with pytest.raises(ConfigError, match=r"ferret.seeds: expected per-client where ferret.mode is"):
        build([*given, ("ferret.seeds", "shared-round")])
