"""The quality page says what its files say, and the benchmark's forms fit their bytes."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import quality
from quality import FORMS, shares, worth

from ferret_ext import Packing
from ferret_ext.federated.coordinates import PACKINGS

STEP = {"server_learning_rate": 0.6, "server_warmup": 0}
PAGE = Path(__file__).parents[1] / "benchmarks" / "quality_page.py"


def row(name: str, *last: float, **more: Any) -> dict[str, Any]:
    runs = {
        str(seed): {"K": 7, "losses": [4.0, 3.0, loss], "bytes_up": 600.0} for seed, loss in enumerate(last)
    }
    return {"name": name, "runs": runs, **more}


def test_shares_are_of_fedavg_with_the_same_seed() -> None:
    fedavg = row("fedavg", 2.0, 1.0)
    assert shares(row("a", 2.5, 2.5), fedavg) == [0.75, 0.5]
    assert shares(row("a", 2.5, 2.5, 9.0), fedavg) == [0.75, 0.5]


def test_table_has_losses_shares_and_spread() -> None:
    page = runpy.run_path(str(PAGE))
    text = page["section"](
        "gsm8k",
        [
            row("fedavg", 2.0, 1.0),
            row(
                "choice8 512",
                2.5,
                2.5,
                kind="choice8",
                allocation="curvature",
                bytes=512,
                server_learning_rate=0.6,
            ),
        ],
    )
    assert (
        "| choice8 | curvature | tensor | 7 | 512 | 600 | 0.6 | 0 | 2 | 2.500 | 62.50% | 50.00% .. 75.00% |"
        in text
    )
    assert "seeds 0, 1: the share of FedAvg's loss reduction that Ferret reaches" in text


def test_a_forms_phases_stand_beside_its_share() -> None:
    page = runpy.run_path(str(PAGE))
    ways = [("scalar", 0.04), ("avx2", 0.002)]
    phases = {
        "machine": {"processor": "a processor"},
        "rows": [
            {
                "name": "choice8 512",
                "K": 7,
                "isa": isa,
                "local": 2.0,
                "project": {"median": seconds},
                "rebuild": {"median": seconds / 2},
            }
            for isa, seconds in ways
        ],
    }
    text = page["phases_section"](
        phases, [row("fedavg", 2.0), row("choice8 512", 2.5, kind="choice8", bytes=512)]
    )
    assert "| choice8 | 512 | 7 | 75.0% | 40.00 + 20.00 | 2.00 + 1.00 |" in text
    assert "round takes 2,000 ms" in text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}-{form.bytes}")
def test_forms_fill_their_bytes(form: quality.Form) -> None:
    count, blocks = form.count(47), 47
    if form.kind in PACKINGS:
        used = PACKINGS[form.kind].code_bytes(count) + blocks + quality.SCALES
        assert form.bytes - 2 <= used <= form.bytes
    else:
        assert count * 2 == form.bytes


def test_worth_of_a_sign_and_of_choices() -> None:
    """2 / pi; the largest of two normal magnitudes has the mean 2 / sqrt(pi)."""
    assert worth(Packing(1)) == pytest.approx(2 / math.pi, rel=0.01)
    assert worth(Packing(1, 1)) == pytest.approx(4 / math.pi, rel=0.01)
    assert worth(Packing(8)) == pytest.approx(1, rel=0.01)


def test_page_in_the_documents_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(PAGE), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PAGE), run_name="__main__")
    assert ended.value.code == 0
