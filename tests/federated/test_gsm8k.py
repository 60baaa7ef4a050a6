"""Ferret on real input: GSM8K and a pretrained Llama of 260,000 parameters."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics

EXAMPLE = Path(__file__).parents[2] / "python_examples" / "federated_gsm8k.py"


def run_example(monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    model = str(data / "tiny_llm" / "stories260K-hf")
    arguments = ["--model", model, "--data", str(data / "gsm8k"), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 0
    return read_metrics(out)


def test_two_rounds_of_gsm8k_lower_the_loss(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--rounds", "2", "evaluation.max_samples=20", "training.max_steps=3"]
    rows = run_example(monkeypatch, real_data, tmp_path, *short)
    losses = [row["eval_loss"] for row in rows]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_ten_rounds_of_gsm8k_reach_3(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sends 16 kB a client and round, the model being 1 MB."""
    rows = run_example(monkeypatch, real_data, tmp_path)
    assert len(rows) == 11
    assert rows[0]["eval_loss"] == pytest.approx(7.3137, abs=1e-3)
    assert rows[-1]["eval_loss"] <= 3.0
    assert max(row["payload_bytes_up"] for row in rows) < 3 * 17_000
