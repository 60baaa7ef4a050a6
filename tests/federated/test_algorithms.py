"""Every algorithm from the command line to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import SMALL, read_metrics
from transformers import AutoModelForCausalLM

from ferret_ext.federated import adapters, algorithms, models
from ferret_ext.federated.cli import main
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import AdapterConfig, SimulationConfig, TrainingConfig

ALGORITHMS = get_args(get_type_hints(SimulationConfig)["algorithm"])
FIRST_ORDER = ["fedavg", "fedit", "fedit-sgd", "fedprompt", "fedptuning"]


def simulate(out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["simulate", *SMALL, "--out", str(out), "rounds=2", *arguments]) == 0
    return read_metrics(out)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_create_knows_every_algorithm_of_the_setting(name: Any) -> None:
    algorithm = algorithms.create(SimulationConfig(algorithm=name), LocalTrainer(TrainingConfig(), 0))
    assert algorithm.name == name


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_algorithm_lowers_the_loss_in_two_rounds(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "fedavg":
        pytest.importorskip("peft", reason="adapters need PEFT")
    rows = simulate(tmp_path, f"algorithm={name}", "training.optim=auto", "server_learning_rate=1")
    assert rows[2]["eval_loss"] < rows[0]["eval_loss"]
    up = {row["payload_bytes_up"] for row in rows[1:]}
    assert len(up) == 1
    assert (max(up) > rows[1]["model_bytes"]) == (name == "fedavg")
    assert rows[1]["model_bytes"] == 4 * 107_520
    assert (tmp_path / "model" / "adapter_config.json").exists() == (name in ("fedprompt", "fedptuning"))
    capsys.readouterr()
    config = ["--config", str(tmp_path / "config.yaml")]
    assert main(["eval", str(tmp_path / "model"), "builtin:gsm8k", *config]) == 0
    merged = name in ("fedit", "fedit-sgd")  # rounds the weights once more
    shown = float(capsys.readouterr().out.partition("evaluation loss ")[2].split()[0])
    assert shown == pytest.approx(rows[2]["eval_loss"], abs=1e-3 if merged else 1e-4)


@pytest.mark.parametrize("name", ["fedzo", "fedkseed", "feedsign"])
def test_zeroth_order_algorithm_moves_the_model(tmp_path: Path, name: str) -> None:
    """All but FedZO send the same few bytes, whatever the model's size."""
    steps = ["zeroth_order.perturbations=8"] if name == "feedsign" else ["zeroth_order.steps=2"]
    rows = simulate(tmp_path, f"algorithm={name}", "zeroth_order.learning_rate=1e-4", *steps)
    assert rows[2]["eval_loss"] != rows[1]["eval_loss"] != rows[0]["eval_loss"]
    assert (rows[2]["payload_bytes_up"] > rows[2]["model_bytes"]) == (name == "fedzo")
    assert name == "fedzo" or rows[2]["payload_bytes_up"] < 300


def test_reference_code_mode_lowers_the_loss_and_repeats_to_the_bit(tmp_path: Path) -> None:
    settings = ["ferret.mode=reference-code", "server_learning_rate=1", "client_weights=batches"]
    rows = simulate(tmp_path / "first", *settings)
    assert rows[2]["eval_loss"] < rows[0]["eval_loss"]
    simulate(tmp_path / "second", *settings)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("first", "second")
    )
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_virtual_tokens_take_positions_of_the_models() -> None:
    model = models.tiny_llama(0)
    assert models.max_length(model, 1024) == 512
    adapter = AdapterConfig(type="prompt-tuning", num_virtual_tokens=20)
    assert models.max_length(adapters.attach(model, adapter, 0), 1024) == 492
