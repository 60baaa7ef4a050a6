"""The costs that the benchmark computes for many clients, beside what runs send and write down."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from many_clients import POLICIES, config_of, costs_of, missed, shown_rounds

from ferret_ext.federated import config as configuration
from ferret_ext.federated import estimate, models
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.engines.in_process import simulate
from ferret_ext.federated.report import RunFolder


class Silent:
    """A narrator that says nothing, and keeps the metrics."""

    def __init__(self, folder: RunFolder) -> None:
        self.round_ends = folder.append

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


def record_sizes(path: Path) -> list[int]:
    """Bytes of each record with its length, read without the package."""
    data, at, sizes = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        sizes.append(8 + length)
        at += 8 + length
    return sizes


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_of_a_run(tmp_path: Path, policy: str) -> None:
    clients, chosen = 6, 3
    given = [
        *(("model", "builtin:tiny-llama"), ("data", "builtin:gsm8k"), ("out", str(tmp_path / "run"))),
        *(("rounds", 2), ("num_clients", clients), ("client_fraction", 0.5), ("num_threads", 1)),
        *(("training.max_steps", 1), ("training.gradient_accumulation_steps", 1), ("ferret.K", 96)),
        *(("evaluation.max_samples", 2), ("dataset.max_length", 96), ("server_learning_rate", 0.1)),
        *((f"ferret.{name}", value) for name, value in POLICIES[policy].items()),
    ]
    config = configuration.build(given)
    folder = RunFolder(config)
    result = simulate(config, Silent(folder), folder.open_journal)  # type: ignore[arg-type]
    last = result.history[-1]

    model = models.skeleton("builtin:tiny-llama", "auto")
    computed = costs_of(config_of(policy, clients, chosen, K=96), model)
    record = record_sizes(tmp_path / "run" / "ledger")[-1]
    if policy == "fixed-pool":  # whose updates differ in size, and the computed one is the largest
        assert last.payload_bytes_up <= chosen * computed.update
    else:
        assert last.payload_bytes_up == pytest.approx(chosen * computed.update, abs=chosen * 24)
    assert record == pytest.approx(computed.record, abs=24 * (1 + chosen))


def test_missed_broadcasts_are_those_of_the_servers_draws() -> None:
    """Against the expectation, which `estimate.Traffic.down` has in closed form, and round by round."""
    clients, chosen, rounds = 2000, 100, 60
    gaps = missed(clients, chosen, rounds)
    assert gaps[0] == chosen  # the opening
    config = config_of("shared-round", clients, chosen, K=64)
    traffic = estimate.traffic(config, models.skeleton("builtin:tiny-llama", "auto"))
    openings = len(np.unique(np.concatenate([draw(clients, chosen, r) for r in range(1, rounds + 1)])))
    expected = traffic.down(rounds) / traffic.broadcast
    assert gaps.sum() - openings == pytest.approx(expected, rel=0.02)


def draw(clients: int, chosen: int, round_: int) -> list[int]:
    """As the server does it."""
    from torch import nn

    from ferret_ext.federated.algorithms.ferret import Ferret
    from ferret_ext.federated.server import Server

    algorithm = Ferret(FerretConfig(K=4, granularity="tensor"), 1.0, lambda *_: 0.0)
    server = Server(algorithm, nn.Linear(8, 8), range(clients), chosen / clients, 0)
    return server.choose(round_)


def test_missed_follows_the_servers_own_draws() -> None:
    clients, chosen, rounds = 40, 8, 6
    seen, sums = [0] * clients, []
    for round_ in range(1, rounds + 1):
        drawn = draw(clients, chosen, round_)
        sums.append(sum(round_ - seen[client] for client in drawn))
        for client in drawn:
            seen[client] = round_
    assert missed(clients, chosen, rounds).tolist() == sums


def test_rounds_that_are_shown() -> None:
    assert shown_rounds(30) == [1, 2, 5, 10, 20, 30]
