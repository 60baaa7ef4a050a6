"""FedZO, FedKSeed, FedKSeed-Pro, DeComFL and FeedSign against a few lines with materialised directions."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from federation import assert_only_the_first_is_refused, deliver
from regression import EXAMPLES, direction, flat, loss, toy, walk_by_the_book
from torch import Tensor, nn

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import Algorithm, LocalData
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.fedkseed import FedKSeed, FedKSeedPro
from ferret_ext.federated.algorithms.scalar_rounds import DeComFL, FeedSign
from ferret_ext.federated.client import endless_batches
from ferret_ext.federated.config import ZerothOrderConfig
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.seeds import derive, derive_many
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message, WireError
from ferret_ext.federated.zeroth_order import ZerothOrderTrainer, direction_seeds

RATE, EPS, SERVER_RATE, SEED, K = 0.02, 1e-3, 0.5, 17, 40
NUMEL = flat(list(toy().parameters())).numel()
KINDS: dict[str, type[Any]] = {kind.name: kind for kind in (FedKSeed, FedKSeedPro, DeComFL, FeedSign)}
STEPS = {"fedkseed": 8, "fedkseed-pro": 8, "decomfl": 3, "feedsign": 1}


@dataclass
class Federation:
    """A server and one client replica for all, as an engine would hold them. Client i has 4 examples."""

    algorithm: Algorithm[Any]
    server: Server[Any]
    client: Any

    def data(self, client: int) -> LocalData:
        round_ = len(self.server.broadcasts)
        part = EXAMPLES[4 * client : 4 * client + 4]
        return LocalData(client, round_, 100 * round_ + client, part, weight=1.0 + client)

    def round(self, clients: int = 3) -> list[bytes]:
        messages = [
            self.algorithm.client_update(
                self.client, self.data(client), self.server.broadcasts_since(0)
            ).payload
            for client in range(clients)
        ]
        assert not deliver(self.server, messages)
        return messages


def federation(name: str, model: nn.Module | None = None, loss: Any = loss, **changed: Any) -> Federation:
    model = model or toy()
    given = {
        "steps": STEPS[name],
        "perturbations": 2,
        "learning_rate": RATE,
        "eps": EPS,
        "candidate_seeds": K,
    }
    config = ZerothOrderConfig(**{**given, **changed})
    algorithm = KINDS[name](config, SERVER_RATE, SEED, loss)
    server = Server(algorithm, model, range(3), 1.0, 0)
    return Federation(algorithm, server, algorithm.replicate(copy.deepcopy(model)))


def batches(client: int, round_: int, steps: int) -> list[list[Example]]:
    order = endless_batches(4, 1, derive(100 * round_ + client, "training"))
    return [[EXAMPLES[4 * client + i] for i in next(order)] for _ in range(steps)]


def test_fedzo_averages_zeroth_order_walks() -> None:
    """w_r = w_{r-1} - server rate sum_i p_i (w_{r-1} - w_i), w_i after client i's local steps."""
    config = ZerothOrderConfig(steps=8, perturbations=2, learning_rate=RATE, eps=EPS)
    algorithm = FedAvg(SERVER_RATE, ZerothOrderTrainer(config, loss, 1).train, "fedzo")
    fed = Federation(algorithm, Server(algorithm, toy(), range(3), 1.0, 0), algorithm.replicate(toy()))
    w = flat(list(toy().parameters()))
    for round_ in (1, 2):
        fed.round()
        ends = []
        for client in range(3):
            seeds = direction_seeds(derive(100 * round_ + client, "training"), 8, 2)
            zs = [[direction(seed, NUMEL, "gaussian") for seed in row] for row in seeds]
            ends.append(walk_by_the_book(w, zs, batches(client, round_, 8), RATE, EPS)[0])
        w = w - SERVER_RATE * sum((1 + i) / 6 * (w - end) for i, end in enumerate(ends))
        torch.testing.assert_close(flat(fed.server.replica.params), w, rtol=0, atol=1e-9)


def candidates() -> list[Tensor]:
    return [direction(seed, NUMEL, "gaussian") for seed in derive_many(SEED, "candidate", K)]


def pairs(message: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    values = wire.decode(message).values
    return values["candidates"], values["slopes"]  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed-pro"])
def test_fedkseed_is_its_paper_over_two_rounds(name: str) -> None:
    """Clients walk from w_{r-1}; a_j += sum_i weight_i g_ij; w_r = w_0 - rate sum_j a_j z_j."""
    fed, zs = federation(name), candidates()
    base = w = flat(list(toy().parameters()))
    sums = torch.zeros(K, dtype=torch.float64)
    for round_ in (1, 2):
        for client, message in enumerate(fed.round()):
            drawn, sent = pairs(message)
            rows = drawn.reshape(8, 2)
            directions = [[zs[j] for j in row] for row in rows]
            _, slopes = walk_by_the_book(w, directions, batches(client, round_, 8), RATE, EPS)
            np.testing.assert_allclose(sent, slopes.flatten().numpy() / 2, rtol=1e-6, atol=1e-7)
            sums.index_add_(0, torch.from_numpy(drawn.astype(int)), slopes.flatten() / 2 * (1 + client) / 6)
        w = base - SERVER_RATE * RATE * sum(a * z for a, z in zip(sums, zs, strict=True))
        torch.testing.assert_close(flat(fed.server.replica.params), w, rtol=0, atol=1e-7)
    assert (w - base).norm() > 0.01


def test_pro_takes_candidates_by_the_size_of_their_slopes() -> None:
    """softmax(minmax(mean |clipped g|)), the mean counting one 0 more, over all rounds."""
    fed = federation("fedkseed-pro", clip=0.8)
    seen: list[list[float]] = [[0.0] for _ in range(K)]
    for _ in range(3):
        for message in fed.round():
            for j, slope in zip(*pairs(message), strict=True):
                seen[j].append(min(abs(float(slope) * 2), 0.8))
    assert max(map(max, seen)) == 0.8
    mean = np.array([np.mean(slopes) for slopes in seen])
    scaled = (mean - mean.min()) / (mean.max() - mean.min())
    odds = np.exp(scaled) / np.exp(scaled).sum()
    np.testing.assert_allclose(fed.algorithm.odds(fed.server.replica), odds, rtol=1e-5)
    late = fed.algorithm.replicate(toy())
    fed.algorithm.rebuild(late, fed.server.broadcasts[-1])
    np.testing.assert_array_equal(fed.algorithm.odds(late), fed.algorithm.odds(fed.server.replica))


def test_pro_draws_by_its_odds() -> None:
    fed = federation("fedkseed-pro", steps=400, perturbations=1, learning_rate=1e-9, candidate_seeds=8)
    fed.round(1)
    odds = fed.algorithm.odds(fed.server.replica)
    drawn, _ = pairs(fed.round(1)[0])
    counts = np.bincount(drawn, minlength=8)
    assert odds.max() / odds.min() == pytest.approx(math.e, rel=0.01)
    assert (np.abs(counts - 400 * odds) < 4 * np.sqrt(400 * odds)).all()
    assert np.square(counts - 400 * odds).sum() < np.square(counts - 50).sum()


@pytest.mark.parametrize(
    ("steps", "perturbation"), [(1, "auto"), (1, "in_place"), (3, "auto"), (3, "in_place")]
)
def test_decomfl_is_its_paper_over_two_rounds(steps: int, perturbation: str) -> None:
    """Clients walk along the server's directions; w_r = w_{r-1} - rate / P sum_tp mean_i(g_itp) z_tp."""
    fed = federation("decomfl", steps=steps, perturbation=perturbation)
    w = flat(list(toy().parameters()))
    for round_ in (1, 2):
        seeds = direction_seeds(derive(SEED, "directions", round_), steps, 2)
        zs = [[direction(seed, NUMEL, "gaussian") for seed in row] for row in seeds]
        mean = torch.zeros(steps, 2, dtype=torch.float64)
        for client, message in enumerate(fed.round()):
            _, slopes = walk_by_the_book(w, zs, batches(client, round_, steps), RATE, EPS)
            np.testing.assert_allclose(
                wire.decode(message).values["slopes"], slopes.numpy(), rtol=1e-6, atol=1e-7
            )
            mean += slopes * (1 + client) / 6
        change = sum(g * z for gs, row in zip(mean, zs, strict=True) for g, z in zip(gs, row, strict=True))
        w = w - SERVER_RATE * RATE / 2 * change
        torch.testing.assert_close(flat(fed.server.replica.params), w, rtol=0, atol=1e-8)


def test_feedsign_steps_along_the_majority() -> None:
    fed = federation("feedsign", perturbations=6)
    w = flat(list(toy().parameters()))
    for round_ in (1, 2):
        seeds = direction_seeds(derive(SEED, "directions", round_), 1, 6)[0]
        zs = [direction(seed, NUMEL, "gaussian") for seed in seeds]
        votes = torch.zeros(6, dtype=torch.float64)
        for client in range(3):
            _, slopes = walk_by_the_book(w, [zs], batches(client, round_, 1), RATE, EPS)
            votes += slopes[0].sign()
        sent = np.stack([wire.decode(message).values["votes"][0] for message in fed.round()])  # type: ignore[index]
        assert sent.sum(0).tolist() == votes.tolist()
        assert len(set(votes.tolist())) > 1
        w = w - SERVER_RATE * RATE / 6 * sum(vote * z for vote, z in zip(votes.sign(), zs, strict=True))
        torch.testing.assert_close(flat(fed.server.replica.params), w, rtol=0, atol=1e-9)


def test_feedsign_makes_no_step_where_votes_are_tied() -> None:
    fed = federation("feedsign", perturbations=1)
    message = wire.decode(fed.algorithm.client_update(fed.client, fed.data(0), fed.server.broadcasts).payload)
    votes = np.array([[1]], np.int8)
    opposed = [
        Message(**{**vars(message), "client": client, "values": {"votes": vote * votes}})
        for client, vote in enumerate(np.array([1, -1], np.int8))
    ]
    before = flat(fed.server.replica.params)
    assert not deliver(fed.server, [wire.encode(vote) for vote in opposed])
    assert torch.equal(flat(fed.server.replica.params), before)


@pytest.mark.parametrize("snapshot", ["memory", "disk"])
@pytest.mark.parametrize("perturbation", ["auto", "in_place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_all_parties_hold_the_same_bits(
    name: str, dtype: torch.dtype, perturbation: str, snapshot: str
) -> None:
    """The server, who never trains, a client that does, and one that joins after three rounds."""
    fed = federation(name, toy(dtype), perturbation=perturbation, snapshot=snapshot, learning_rate=0.3)
    start = flat(fed.server.replica.params)
    for _ in range(3):
        fed.round()
    after = flat(fed.server.replica.params)
    assert not torch.equal(start, after)
    late = fed.algorithm.replicate(toy(dtype))
    for replica in (fed.client, late):
        replica.rewind()
        for broadcast in fed.server.broadcasts_since(0 if replica is late else 3):
            fed.algorithm.rebuild(replica, broadcast)
        assert torch.equal(flat(replica.params), after)
        assert replica.round == 3


@pytest.mark.parametrize("generator", ["streams", "torch"])
@pytest.mark.parametrize("name", KINDS)
def test_rounds_repeat_to_the_bit(name: str, generator: str) -> None:
    first, second = (federation(name, generator=generator) for _ in range(2))
    assert [first.round() for _ in range(2)] == [second.round() for _ in range(2)]
    assert torch.equal(flat(first.server.replica.params), flat(second.server.replica.params))


def test_a_late_fedkseed_client_needs_the_newest_broadcast_only() -> None:
    fed = federation("fedkseed")
    for _ in range(3):
        fed.round()
    assert fed.server.broadcasts_since(0) == [fed.server.broadcasts[0], fed.server.broadcasts[3]]
    assert fed.server.broadcasts_since(4) == []
    assert len(fed.server.broadcasts[0]) < 100
    assert len(fed.server.broadcasts[3]) < 4 * K + 120


def test_rounds_of_scalars_refuse_a_gap() -> None:
    fed = federation("decomfl")
    for _ in range(2):
        fed.round()
    with pytest.raises(WireError, match="decomfl: broadcast must have round 1, got 2"):
        fed.algorithm.rebuild(fed.algorithm.replicate(toy()), fed.server.broadcasts[2])


def test_messages_are_scalars() -> None:
    """The model has 94 parameters; a billion would make no difference to these lengths."""
    overhead = 100
    assert len(federation("fedkseed").round(1)[0]) <= 16 * 6 + overhead
    assert len(federation("decomfl", steps=1, perturbations=5).round(1)[0]) <= 5 * 4 + overhead
    assert len(federation("feedsign", perturbations=8).round(1)[0]) <= 8 + overhead


@pytest.mark.parametrize("name", KINDS)
def test_steps_without_finite_losses_change_nothing(name: str) -> None:
    """The first two losses are NaN, so is the first slope; what is sent leaves it out or says 0."""
    failures = iter([math.nan, math.nan])
    fed = federation(name, loss=lambda *given: loss(*given) * next(failures, 1.0))
    values = wire.decode(fed.round(1)[0]).values
    if name.startswith("fedkseed"):
        assert values["candidates"].size == values["slopes"].size == 15  # type: ignore[union-attr]
    else:
        sent = values["slopes" if name == "decomfl" else "votes"]
        assert sent[0, 0] == 0 != sent[0, 1]  # type: ignore[index, call-overload]
    assert flat(fed.server.replica.params).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_a_client_without_any_finite_loss_has_diverged_and_comes_back(name: str) -> None:
    factors = [math.nan] * 100
    fed = federation(name, loss=lambda *given: loss(*given) * (factors.pop() if factors else 1.0))
    reply = fed.algorithm.client_update(fed.client, fed.data(0), fed.server.broadcasts)
    assert reply.failure == "no step had a finite loss; lower zeroth_order.learning_rate"
    factors.clear()
    fed.round()
    fed.client.rewind()
    for broadcast in fed.server.broadcasts:
        fed.algorithm.rebuild(fed.client, broadcast)
    assert torch.equal(flat(fed.client.params), flat(fed.server.replica.params))


@pytest.mark.parametrize("name", KINDS)
def test_a_client_without_examples_is_left_out(name: str) -> None:
    fed = federation(name)
    reply = fed.algorithm.client_update(fed.client, LocalData(0, 1, 5, []), fed.server.broadcasts)
    assert reply.failure == "it holds no examples"


def replaced(message: bytes, **values: Any) -> bytes:
    decoded = wire.decode(message)
    return wire.encode(Message(**{**vars(decoded), "values": {**decoded.values, **values}}))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("fedkseed", {"candidates": np.full(16, K, np.uint16)}, "candidates below 40, got 40"),
        ("fedkseed", {"candidates": np.zeros(17, np.uint16)}, "at most 16 candidates, got 17"),
        (
            "fedkseed",
            {"candidates": np.zeros(16, np.uint8)},
            r"candidates as uint16 of shape \[16\], got uint8",
        ),
        (
            "fedkseed",
            {"slopes": np.zeros(15, np.float32)},
            r"slopes as float32 of shape \[16\], got .*\[15\]",
        ),
        ("decomfl", {"slopes": np.zeros((2, 3), np.float32)}, r"slopes as float32 of shape \[3, 2\], got"),
        ("decomfl", {"slopes": 1.0}, "slopes as ndarray, got float"),
        ("feedsign", {"votes": np.full((1, 2), 2, np.int8)}, "votes of -1, 0 or 1, got 2"),
        ("feedsign", {"votes": np.zeros((1, 1), np.int8)}, r"votes as int8 of shape \[1, 2\], got"),
    ],
)
def test_server_refuses_values_that_do_not_fit(name: str, values: dict[str, Any], message: str) -> None:
    fed, sent = federation(name), federation(name).round()
    reason = f"{name}: client 0's update must have {message}"
    assert_only_the_first_is_refused(fed.server, [replaced(sent[0], **values), *sent[1:]], reason)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 0.5},
        {"eps": 0.5},
        {"basis": "uniform"},
        {"generator": "torch"},
        {"perturbations": 1},
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_parties_of_other_settings_refuse_each_other(name: str, changed: dict[str, Any]) -> None:
    fed, other = federation(name), federation(name, **changed)
    with pytest.raises(WireError, match=f"{name}: broadcast must have digest"):
        fed.algorithm.rebuild(fed.client, other.server.broadcasts[0])
    with pytest.raises(QuorumError, match="client 0's update must have digest"):
        deliver(fed.server, other.round())


def test_client_refuses_broadcasts_that_do_not_fit() -> None:
    fed = federation("fedkseed-pro")
    fed.round()
    late = fed.algorithm.replicate(toy())
    with pytest.raises(WireError, match=r"broadcast must have sums as float32 of shape \[40\], got .*\[39\]"):
        fed.algorithm.rebuild(late, replaced(fed.server.broadcasts[1], sums=np.zeros(39, np.float32)))
    with pytest.raises(WireError, match="broadcast must have magnitudes as ndarray, got int"):
        fed.algorithm.rebuild(late, replaced(fed.server.broadcasts[1], magnitudes=3))


def test_feedsign_refuses_local_steps() -> None:
    with pytest.raises(ConfigError, match=r"zeroth_order\.steps: expected 1 with feedsign, .* got 2"):
        federation("feedsign", steps=2)


def test_an_exact_round_keeps_no_copy() -> None:
    assert federation("decomfl", steps=1).client.snapshot is None
    assert federation("feedsign").client.snapshot is None
    assert federation("decomfl", steps=2).client.snapshot is not None


def test_candidates_are_distinct_and_follow_from_the_seed() -> None:
    seeds = derive_many(SEED, "candidate", 4096)
    assert len(set(seeds)) == 4096
    assert seeds[:10] == derive_many(SEED, "candidate", 10)
    assert not set(seeds) & set(derive_many(SEED + 1, "candidate", 4096))
