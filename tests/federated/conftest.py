"""A small run that several tests look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ferret_ext.federated.cli import main
from ferret_ext.federated.evaluation import Evaluator

SMALL = [
    *("--model", "builtin:tiny-llama", "--data", "builtin:gsm8k", "--rounds", "3", "--num-clients", "4"),
    *(
        "client_fraction=0.5",
        "dataset.max_length=160",
        "training.max_steps=2",
        "ferret.K=64",
        "ferret.coordinates=float32",
        "ferret.allocation=size",
        "num_threads=1",
    ),
    *("training.gradient_accumulation_steps=1", "training.optim=adam", "training.learning_rate=0.01"),
    *("evaluation.max_samples=4", "server_learning_rate=0.5"),
]


def read_metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupted_after(monkeypatch: pytest.MonkeyPatch, round_: int) -> None:
    """Ctrl-C while the model of this round is evaluated, once."""
    original = Evaluator.after_round

    def after_round(self: Evaluator, rounds: int, now: int, *rest: Any) -> Any:
        if now == round_:
            monkeypatch.setattr(Evaluator, "after_round", original)
            raise KeyboardInterrupt
        return original(self, rounds, now, *rest)

    monkeypatch.setattr(Evaluator, "after_round", after_round)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("small") / "run"
    assert main(["simulate", *SMALL, "--out", str(folder)]) == 0
    return folder
