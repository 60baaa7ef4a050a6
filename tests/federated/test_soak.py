"""The soak's faults and its account, on a small scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def soak(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(SOAK), *options, "--json", str(folder / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((folder / "soak.json").read_text())["rows"]
    return row  # type: ignore[no-any-return]


def assert_every_message_is_accounted_for(row: dict[str, Any]) -> None:
    """The account itself is made by soak.py, from the ledger; here its sums."""
    faults = row["faults"]
    assert row["turns"] == sum(faults.values()) == row["rounds"] * round(row["clients"] / 4)
    assert row["accepted"] == faults["none"] + faults["twice"]
    spoiled = row["turns"] - row["accepted"] - faults["crash"] - faults["late"]
    least = spoiled + faults["twice"]
    assert least <= row["rejected"] <= least + faults["late"]


def test_every_message_is_accounted_for(tmp_path: Path) -> None:
    row = soak(tmp_path, "--rounds", "40", "--clients", "60", "--kills", "2")
    assert_every_message_is_accounted_for(row)
    assert len(row["faults"]) == 12
    assert row["last_loss"] < row["first_loss"]


@pytest.mark.slow
def test_a_long_federation_loses_nothing(tmp_path: Path) -> None:
    row = soak(tmp_path, "--seed", "1")
    assert_every_message_is_accounted_for(row)
    assert row["server_killed"] >= 5
    assert row["memory"]["bytes_a_round"] < 20_000
