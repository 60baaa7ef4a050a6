"""The benchmark of a round runs, and counts parameters and bytes as the wire format says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_round.py"
HIDDEN, INTERMEDIATE, VOCABULARY = 64, 176, 32000
UPDATE = 103  # bytes around the coordinates, of them 90 the head
BROADCAST = 103  # bytes around the updates and their lengths of 3 bytes


@pytest.mark.parametrize("flags", [[], ["--start-on-host"]], ids=["", "start on host"])
def test_bench_round_counts_the_messages_bytes(flags: list[str], tmp_path: Path) -> None:
    written = tmp_path / "round.json"
    options = {"--layers": 1, "--hidden": HIDDEN, "--length": 8, "--K": 40, "--clients": 3, "--json": written}
    options |= {"--steps": 2, "--accumulation": 2, "--trained": 1}
    arguments = [str(word) for option in options.items() for word in option]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *arguments, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    attention = (
        2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 8
    )  # queries, outputs; keys, values of 4 of 32 heads
    layer = attention + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    parameters = layer + 2 * VOCABULARY * HIDDEN + HIDDEN
    (row,) = json.loads(written.read_text())["rows"]
    assert (row["blocks"], row["K"], row["clients"], row["local"]["calls"]) == (12, 40, 3, 1)
    assert row["parameters"] == parameters
    assert row["model_bytes"] == 2 * parameters
    assert row["sent_bytes"] == UPDATE + 4 * 40
    assert row["received_bytes"] == BROADCAST + 3 * (3 + row["sent_bytes"])
    assert row["share_changed"] > 0
    assert row["start_on_host"] == bool(flags)
    assert row["peak_memory_bytes"] > row["model_bytes"]
    assert re.search(r"sent by a client +263 bytes", done.stdout)
