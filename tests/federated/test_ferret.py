"""Ferret's rounds against a few lines that follow the paper with materialised bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federation import Federation, assert_only_the_first_is_refused, flat, locally_trained, toy, train
from ferret_federation import SEEDS, STEP, basis_matrix, changed, federation
from torch import Tensor, nn

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.ferret import Ferret, block_norms
from ferret_ext.federated.config import FerretConfig, build
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import WireError

VARIANCE = {"rademacher": 1.0, "uniform": 21845 / 65536, "gaussian": 1.0}  # rho d


def federate_by_the_book(fed: Federation, messages: list[bytes], basis: str) -> Tensor:
    """w - step * mean_i V_i gamma_i with gamma_l = V_l^T delta_l / (rho_l K_l), trained anew here."""
    start = toy()
    plan = fed.algorithm.replicate(start).plan
    total = torch.zeros(sum(block.numel for block in plan.blocks), dtype=torch.float64)
    for message in messages:
        update = wire.decode(message)
        model = locally_trained(start, update.client)
        delta = flat(start.parameters()) - flat(model.parameters())
        parts = delta.split([block.numel for block in plan.blocks])
        rebuilt = []
        for block, part in zip(plan.blocks, parts, strict=True):
            V = basis_matrix(block, update.values["seed"], basis)
            gamma = V.T @ part * block.numel / (VARIANCE[basis] * block.k)
            rebuilt.append(V @ gamma)
        total += torch.cat(rebuilt) / len(messages)
    return flat(start.parameters()) - STEP * total


@pytest.mark.parametrize("basis", ["rademacher", "uniform", "gaussian"])
@pytest.mark.parametrize("granularity", ["tensor", "packed", 30])
@pytest.mark.parametrize("seeds", SEEDS)
def test_round_is_the_papers(basis: str, granularity: Any, seeds: str) -> None:
    fed = federation(basis=basis, granularity=granularity, seeds=seeds)
    messages = fed.round()
    expected = federate_by_the_book(fed, messages, basis)
    torch.testing.assert_close(flat(fed.server.replica.params), expected, rtol=0, atol=2e-6)
    assert (flat(fed.server.replica.params) - flat(toy().parameters())).norm() > 0.01


@pytest.mark.parametrize("allocation", ["size", "norm", "mse"])
@pytest.mark.parametrize("seeds", SEEDS)
def test_clients_and_server_hold_the_same_bits(allocation: str, seeds: str) -> None:
    fed = federation(allocation=allocation, seeds=seeds)
    for _ in range(3):
        fed.round()
    fed.catch_up()
    assert fed.client.round == fed.server.replica.round == 3
    assert fed.client.plan == fed.server.replica.plan
    for mine, theirs in zip(fed.client.params, fed.server.replica.params, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_start_in_host_memory_changes_no_bit(device: str) -> None:
    seen = []
    for on_host in (False, True):
        replica = federation().algorithm.replicate(toy().to(device))
        replica.start_on_host = on_host
        start = flat(replica.params)
        replica.mark()
        assert replica.start[0].is_cuda == (device == "cuda" and not on_host)
        with torch.no_grad():
            for param in replica.params:
                param.mul_(0.7)
        seen.append((replica.project(replica.part, 3, "rademacher"), replica.norms()))
        replica.rewind()
        assert torch.equal(flat(replica.params), start)
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_client_that_comes_late_rebuilds_from_the_broadcasts(seeds: str) -> None:
    fed = federation(allocation="norm", seeds=seeds)
    for _ in range(3):
        fed.round()
    late = fed.algorithm.replicate(toy())
    for broadcast in fed.server.broadcasts:
        fed.algorithm.rebuild(late, broadcast)
    assert torch.equal(flat(late.params), flat(fed.server.replica.params))
    with pytest.raises(WireError, match="broadcast must have round 1, got 2"):
        fed.algorithm.rebuild(fed.algorithm.replicate(toy()), fed.server.broadcasts[2])


@pytest.mark.parametrize("seeds", SEEDS)
def test_rounds_repeat_to_the_bit(seeds: str) -> None:
    first, second = federation(seeds=seeds), federation(seeds=seeds)
    assert [first.round() for _ in range(2)] == [second.round() for _ in range(2)]
    assert torch.equal(flat(first.server.replica.params), flat(second.server.replica.params))


def test_seeds_differ_between_clients_and_rounds() -> None:
    fed = federation()
    seeds = [wire.decode(message).values["seed"] for _ in range(3) for message in fed.round()]
    assert len(set(seeds)) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seeds", SEEDS)
def test_clients_train_in_any_dtype(dtype: torch.dtype, seeds: str) -> None:
    """The model moves, stays finite, and server and client agree; coordinates are float32 on the wire."""
    fed = federation(toy().to(dtype), seeds=seeds)
    before = flat(fed.server.replica.params)
    messages = fed.round()
    fed.catch_up()
    after = flat(fed.server.replica.params)
    assert fed.server.replica.params[0].dtype == dtype
    assert after.isfinite().all()
    assert (after - before).norm() > 0.01
    assert torch.equal(after, flat(fed.client.params))
    assert len({len(message) for message in messages}) == 1


@pytest.mark.parametrize("seeds", SEEDS)
def test_rounding_by_chance_moves_all_parties_alike(seeds: str) -> None:
    """By the round's own seed; not where rounding to nearest leads, but less than a place from there."""
    fed = federation(toy().bfloat16(), seeds=seeds, rounding="stochastic")
    nearest = federation(toy().bfloat16(), seeds=seeds)
    nearest.apply(fed.round())
    fed.catch_up()
    assert torch.equal(flat(fed.server.replica.params), flat(fed.client.params))
    mine, other = flat(fed.server.replica.params), flat(nearest.server.replica.params)
    assert (mine != other).float().mean() > 0.1
    assert (mine - other).abs().max() <= 0.02 * other.abs().max()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"dtype": "float32"}, "dtype bfloat16 or float16, got stochastic"),
        ({"algorithm": "fedavg"}, "ferret in paper mode"),
        ({"ferret.mode": "reference-code"}, "ferret in paper mode"),
        ({"server.optim": "adam"}, "server.optim sgd without momentum"),
    ],
)
def test_rounding_by_chance_belongs_to_the_plain_step_of_narrow_weights(wrong: Any, text: str) -> None:
    given = {"model": "m", "data": "d", "out": "o", "dtype": "bfloat16", "ferret.rounding": "stochastic"}
    assert build(list(given.items())).ferret.rounding == "stochastic"
    with pytest.raises(ConfigError, match=f"ferret.rounding: expected nearest unless with {text}"):
        build(list({**given, **wrong}.items()))


def test_clients_of_different_dtypes_share_a_round() -> None:
    """A bfloat16 client's update is the float32 client's but for its own rounding."""
    single, half = (federation(model, verify_weights=False) for model in (toy(), toy().bfloat16()))
    message, other = single.round([1.0])[0], half.round([1.0])[0]
    mixed = federation(verify_weights=False)
    update = wire.decode(other)
    assert not mixed.apply([message, changed(other, client=1, seed=update.value("seed", int) + 1)])
    gammas = torch.from_numpy(wire.decode(message).values["gammas"])
    difference = torch.from_numpy(update.values["gammas"]) - gammas
    assert difference.norm() < 0.2 * gammas.norm()
    assert flat(mixed.server.replica.params).isfinite().all()


def test_frozen_parameters_are_left_out() -> None:
    model = toy()
    frozen = model[0].weight.requires_grad_(False)
    before = frozen.clone()
    fed = federation(model)
    fed.round()
    assert [name for name, _ in fed.server.replica.plan.tensors] == ["0.bias", "2.weight", "2.bias"]
    assert torch.equal(frozen, before)


def test_block_norms_estimate_the_updates_norms() -> None:
    """Within 5 standard errors, sqrt(2 / (2 K_l)) relative, of the norm of each block."""
    torch.manual_seed(0)
    scales = (0.1, 3.0, 1.0)
    new = [torch.randn(2000) * scale for scale in scales]
    old = [torch.zeros(2000) for _ in scales]
    named = [(f"p{i}", nn.Parameter(tensor)) for i, tensor in enumerate(new)]
    plan = ferret_ext.BlockPlan.from_parameters(named, 3000)
    gammas = ferret_ext.project_difference(plan, old, new, 7)
    estimate = torch.tensor(block_norms(plan, [gammas.numpy()], [1.0]))
    exact = torch.tensor([tensor.norm().item() for tensor in new])
    assert ((estimate / exact - 1).abs() < 5 / (2 * 1000) ** 0.5).all()


@pytest.mark.parametrize("seeds", SEEDS)
def test_allocation_by_norm_follows_the_last_round(seeds: str) -> None:
    fed = federation(allocation="norm", seeds=seeds)
    by_size = fed.server.replica.plan
    fed.round()
    plan = fed.server.replica.plan
    assert plan.K == by_size.K == 40
    assert plan != by_size
    assert [block.offset for block in plan.blocks] == [block.offset for block in by_size.blocks]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"round": 2}, "client 0's update must have round 1, got 2"),
        ({"digest": bytes(8)}, "client 0's update must have digest .*, got 0000000000000000"),
        ({"contract": 0x10002}, "client 0's update must have contract 65537, got 65538"),
        ({"contract": 1.0}, "client 0's update must have contract as int, got float"),
        ({"seed": -1}, "client 0's update must have seed as a whole number in"),
        ({"kind": "broadcast"}, "broadcast must have kind update, got broadcast"),
        ({"run": b"another."}, "client 0's update must have run 0000000000000000, got 616e6f74"),
        ({"weights": bytes(8)}, "client 0's update must have weights .*, got 0000000000000000"),
        ({"algorithm": "fedavg"}, "client 0's update must have algorithm ferret, got fedavg"),
    ],
)
def test_server_refuses_updates_of_another_run(fields: dict[str, Any], message: str) -> None:
    fed, sent = federation(), federation().round()
    assert_only_the_first_is_refused(fed.server, [changed(sent[0], **fields), *sent[1:]], message)


def test_a_round_without_updates_leaves_the_server_as_it_is() -> None:
    fed, sent = federation(), federation().round()
    short = changed(sent[0], gammas=wire.decode(sent[0]).values["gammas"][:-1])
    expected = r"client 0's update must have gammas as float32 of shape \[40\], got float32 of shape \[39\]"
    before = flat(fed.server.replica.params)
    with pytest.raises(
        QuorumError, match=f"expected at least 1 updates, got 0; client 0: ferret: {expected}"
    ):
        fed.apply([short])
    with pytest.raises(QuorumError, match="round 1: expected at least 1 updates, got 0"):
        fed.apply([])
    assert torch.equal(before, flat(fed.server.replica.params))
    assert len(fed.server.broadcasts) == 1


def test_client_refuses_the_broadcast_of_another_plan() -> None:
    fed, other = federation(), federation(K=41)
    with pytest.raises(WireError, match="broadcast must have digest"):
        fed.algorithm.rebuild(fed.client, other.server.broadcasts[0])


def test_too_few_coordinates_are_a_config_error() -> None:
    with pytest.raises(
        ConfigError, match=r"ferret: .*K must be at least the number of blocks, got K = 3 for 4"
    ):
        federation(K=3, granularity="tensor")


def test_server_draws_the_fraction_of_the_clients() -> None:
    algorithm = Ferret(FerretConfig(K=40, coordinates="float32"), STEP, train)
    server = Server(algorithm, toy(), range(40), 0.1, seed=3)
    drawn = [server.choose(round_) for round_ in range(1, 200)]
    assert all(len(clients) == 4 == len(set(clients)) for clients in drawn)
    assert drawn[0] == server.choose(1)
    assert {client for clients in drawn for client in clients} == set(range(40))
    assert len(Server(algorithm, toy(), range(40), 0.001, seed=3).choose(1)) == 1


def test_more_coordinates_than_parameters_are_allowed_and_said() -> None:
    """The error goes on falling as sqrt(d / K); the log says that sending the update itself is cheaper."""
    fed = federation(K=9400)
    assert fed.algorithm.notes(fed.server.replica) == [
        "ferret: 9,400 coordinates are no fewer than the 94 trainable parameters: fedavg sends as much and "
        "loses nothing; lower ferret.K"
    ]
    start = flat(fed.server.replica.params)
    (message,) = fed.round([1.0])
    delta = start - flat(locally_trained(toy(), 0).parameters())
    error = (start - flat(fed.server.replica.params)) / STEP - delta
    assert wire.decode(message).values["gammas"].size == 9400
    assert error.norm() < 0.2 * delta.norm()  # sqrt(d / K) = 0.1
    assert federation(K=93).algorithm.notes(federation(K=93).client) == []


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_servers_step_warms_up(seeds: Any) -> None:
    """Over three rounds to server_learning_rate; everybody goes by the step in the broadcast."""
    fed = federation(seeds=seeds, server_warmup=3)
    for _ in range(5):
        fed.round()
    steps = [wire.decode(broadcast).value("step", float) for broadcast in fed.server.broadcasts[1:]]
    assert steps == pytest.approx([STEP / 3, STEP * 2 / 3, STEP, STEP, STEP])
    assert {wire.decode(b).value("step", float) for b in federation().server.broadcasts[1:]} <= {STEP}


def test_the_reference_codes_step_does_not_warm_up() -> None:
    given = [("model", "m"), ("data", "d"), ("out", "o"), ("ferret.mode", "reference-code")]
    with pytest.raises(ConfigError, match=r"ferret.server_warmup: expected 0 where ferret.mode is ref"):
        build([*given, ("ferret.server_warmup", 2)])


@pytest.mark.parametrize("seeds", SEEDS)
def test_auto_plans_join_small_tensors_and_cut_large_ones(seeds: str) -> None:
    """All parties alike, whose K_l go by the pieces' norms; K may be less than there are tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 2000), nn.Tanh(), nn.Linear(2000, 3))  # 18000, 2000, 6000 and 3
    settings = {"granularity": "auto", "allocation": "curvature", "coordinates": "int8", "seeds": seeds}
    fed = federation(model, K=300, **settings)
    names = [block.name for block in fed.server.replica.plan.blocks]
    assert names == [
        *("0.weight[0:6000]", "0.weight[6000:12000]", "0.weight[12000:18000]", "0.bias"),
        *("2.weight[0:3000]", "2.weight[3000:6000]", "2.bias"),
    ]
    first = [block.k for block in fed.server.replica.plan.blocks]
    for _ in range(2):
        fed.round()
    fed.catch_up()
    assert fed.client.plan == fed.server.replica.plan
    assert [block.k for block in fed.client.plan.blocks] != first
    assert torch.equal(flat(fed.client.params), flat(fed.server.replica.params))
    assert len(federation(K=2, **settings).server.replica.plan.blocks) == 1
