"""Runs killed in mid-write and at random moments go on to the same bits (see crashes.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crashes.py")


def crashes(*options: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_runs_killed_at_any_moment_go_on_to_the_same_bits() -> None:
    counts = crashes("--boundaries", "22", "--moments", "70")
    assert counts["killed at boundaries"] >= 60
    assert counts["killed at random moments"] >= 200


@pytest.mark.slow
def test_runs_killed_at_every_boundary_go_on_to_the_same_bits() -> None:
    counts = crashes("--moments", "1000", "--seed", "1")
    boundaries = sum(count for name, count in counts.items() if name.startswith("boundaries of"))
    assert counts["killed at boundaries"] >= boundaries > 1000
