"""`ferret simulate --dry-run`: what it says beforehand is what a run then takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, read_metrics

from ferret_ext.federated import adapters, algorithms, estimate, models
from ferret_ext.federated.algorithms.base import LocalData
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.cli import main
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig, build
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.estimate import Traffic
from ferret_ext.federated.wire import decode

EXAMPLES = [Example(tuple(range(3, 20)), 5)] * 4
QUICK = [("ferret.K", 32), ("training.max_steps", 1), ("training.gradient_accumulation_steps", 1)]
QUICK += [("zeroth_order.perturbations", 2), ("num_clients", 2)]
ALGORITHMS = ["ferret", "fedavg", "fedit", "fedprompt", "fedzo", "fedkseed", "fedkseed-pro", "decomfl"]


def config_of(*settings: tuple[str, Any]) -> SimulationConfig:
    given = [("model", models.TINY_LLAMA), *QUICK, *settings]
    return adapters.resolve(build(given, required=["model"]))


def messages(config: SimulationConfig) -> tuple[list[int], int]:
    """Bytes of the updates of two clients, and of the broadcast after them."""
    model = adapters.attach(models.tiny_llama(0), config.adapter, 0)
    algorithm = algorithms.create(config, LocalTrainer(config.training, 0))
    replica = algorithm.replicate(model)
    opening = algorithm.open(replica)
    data = [LocalData(client, 1, 2**60 + client, EXAMPLES, 4.0) for client in range(2)]
    payloads = [algorithm.client_update(replica, of_client, [opening]).payload for of_client in data]
    replica.rewind()
    broadcast = algorithm.server_apply(replica, Updates([decode(it) for it in payloads], payloads, [1.0] * 2))
    return [len(payload) for payload in payloads], len(broadcast)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "feedsign"])
def test_messages_are_as_long_as_estimated(algorithm: str) -> None:
    steps = 1 if algorithm == "feedsign" else 3
    config = config_of(("algorithm", algorithm), ("zeroth_order.steps", steps))
    model = adapters.attach(models.skeleton(models.TINY_LLAMA, "float32"), config.adapter, 0)
    expected = estimate.traffic(config, model)
    updates, broadcast = messages(config)
    assert updates == [pytest.approx(expected.update, abs=4)] * 2
    assert broadcast == pytest.approx(expected.broadcast, abs=8)
    assert not expected.at_most


@pytest.mark.parametrize("kind", ["float16", "int8", "int1"])
@pytest.mark.parametrize("seeds", ["per-client", "shared-round"])
def test_few_bits_and_shared_seeds_are_reckoned_with(kind: str, seeds: str) -> None:
    config = config_of(("ferret.coordinates", kind), ("ferret.seeds", seeds))
    expected = estimate.traffic(config, models.skeleton(models.TINY_LLAMA, "float32"))
    updates, broadcast = messages(config)
    assert updates == [expected.update] * 2
    assert broadcast == expected.broadcast


def test_reference_code_sends_no_more_than_estimated() -> None:
    config = config_of(("ferret.mode", "reference-code"))
    expected = estimate.traffic(config, models.skeleton(models.TINY_LLAMA, "float32"))
    updates, broadcast = messages(config)
    assert expected.at_most
    assert max(updates) <= expected.update
    assert broadcast == pytest.approx(expected.broadcast, abs=4)


def test_a_skeleton_has_the_models_shapes_and_no_weights(tmp_path: Path) -> None:
    model = models.tiny_llama(0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for name, dtype in ((models.TINY_LLAMA, "bfloat16"), (str(tmp_path), "auto")):
        empty = models.skeleton(name, dtype)
        assert {it.device.type for it in empty.parameters()} == {"meta"}
        assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in model.named_parameters()
        ]


def test_bytes_received_by_clients_that_come_and_go() -> None:
    """Against counting: two of four clients a round, over all draws that a long simulation makes."""
    always = Traffic(10, 100, chosen=4, clients=4, relayed=True, at_most=False)
    assert always.down(5) == 4 * 4 * 100
    assert always.up(5) == 5 * 4 * 10
    now_and_then = replace(always, chosen=2)
    torch.manual_seed(0)
    received, trials, rounds = 0, 4000, 6
    for _ in range(trials):
        drawn = torch.rand(rounds, 4).argsort(1)[:, :2]
        for client in range(4):
            turns = [r for r in range(rounds) if client in drawn[r].tolist()]
            received += 100 * max(turns, default=0)
    assert now_and_then.down(rounds) == pytest.approx(received / trials, rel=0.02)
    assert replace(now_and_then, relayed=False).down(rounds) == 5 * 2 * 100


def test_dry_run_says_what_the_run_then_measures(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["simulate", *SMALL, "--out", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not out.exists()
    row: dict[str, Any] = read_metrics(small_run)[1]
    assert f"a client's update: {row['payload_bytes_up'] // 2:,} bytes" in shown
    assert "model: 107,520 parameters, all trained: 430.1 kB in float32" in shown
    assert "plan: 14 blocks on 64 coordinates" in shown
    assert "clients: 2 of 4 a round, 3 rounds of ferret" in shown
    assert "2 steps by adam, 2 forward and backward passes" in shown


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--preset", "demo", "dataset.max_length=512", "--rounds=10000000"], "the disk will not be enough"),
        (["--preset", "small/ni", "--model", models.TINY_LLAMA], "as many as the data has values"),
        (["--preset", "small/dolly", "--model", models.TINY_LLAMA], "clients: 4 of 40 a round"),
        (["--preset", "demo", "algorithm=decomfl"], "1 directions, two forward passes each"),
        (["--preset", "demo", "training.num_train_epochs=2"], "2 epochs by adam"),
    ],
)
def test_dry_run_needs_neither_data_nor_folder(
    settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *settings, "--dry-run"]) == 0
    assert said in capsys.readouterr().out


def test_dry_run_checks_the_quorum_against_the_clients_of_the_protocol(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["--preset", "demo", "--num-clients", "none", "robust.quorum=4"]
    assert main(["simulate", *settings, "--dry-run"]) == 2
    assert "robust.quorum: expected at most 3, the clients" in capsys.readouterr().err


def test_dry_run_of_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--model", str(tmp_path / "none"), "--dry-run"]) == 2
    assert "model: expected a folder or a hub name" in capsys.readouterr().err
