"""The results page says what its files say."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "results_page.py"


def comparison(*losses: float) -> dict[str, Any]:
    """Two variants whose last losses are given, a round each."""

    def row(variant: str, loss: float, up: int, local: float) -> dict[str, Any]:
        seconds = {"seconds_local": local, "seconds_project": 0.01, "seconds_aggregate": 0.01}
        return {
            "variant": variant,
            "seeds": 1,
            "loss": loss,
            "lowest": loss,
            "highest": loss,
            "scores": {},
            **seconds,
            "bytes_up": up,
            "bytes_down": 7,
            "peak_memory_bytes": 2**20,
            "to_target": None,
        }

    about = {"processor": "a processor", "threads": 1, "torch": "2.13.0"}
    run = {
        "variant": "ferret",
        "seed": 5,
        "model": "m",
        "data": "d",
        "environment": about,
        "rounds": [{}, {}],
    }
    rows = [row("fedavg", losses[0], 4000, 2.0), row("ferret", losses[1], 40, 2.0)]
    return {"target_loss": 2.5, "rows": rows, "runs": [run]}


def test_page_has_rows_findings_and_the_papers_figures() -> None:
    page = runpy.run_path(str(PAGE))["page"]({"gsm8k": comparison(2.25, 2.75)})
    assert "| fedavg | 2.250 |" in page
    assert page.index("| fedavg | 2.250 | one seed") < page.index("| ferret | 2.750 | one seed")
    assert "with m, 1 rounds, seeds 5; a processor, threads: 1" in page
    assert "take 1.00% of its local training" in page
    assert "FedAvg sends 100 times as many bytes as Ferret" in page
    assert "| fedavg | 38.30 | 39.82 |" in page


def test_page_in_the_documents_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(PAGE), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PAGE), run_name="__main__")
    assert ended.value.code == 0


def test_documents_show_every_comparison() -> None:
    names = {
        path.stem.removeprefix("compare-") for path in (ROOT / "benchmarks/results").glob("compare-*.json")
    }
    text = (ROOT / "docs" / "results.md").read_text()
    for name in names:
        assert f"images/compare-{name}.svg" in text
        assert (ROOT / "docs" / "images" / f"compare-{name}.svg").exists()
        content = json.loads((ROOT / "benchmarks" / "results" / f"compare-{name}.json").read_text())
        assert len(content["rows"]) >= 2
