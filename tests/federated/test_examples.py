"""The short examples run and say what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "python_examples"


def test_project_an_update_rebuilds_part_of_the_update(capsys: pytest.CaptureFixture[str]) -> None:
    """The cosine is sqrt(K / (K + d)) in expectation, here 0.55; the bound leaves the blocks' spread."""
    runpy.run_path(str(EXAMPLES / "project_an_update.py"), run_name="__main__")
    shown = re.search(
        r"9,610 numbers sent as 4,096: cosine of the rebuilt update (\d\.\d+)", capsys.readouterr().out
    )
    assert shown
    assert float(shown[1]) == pytest.approx((4096 / (4096 + 9610)) ** 0.5, abs=0.05)
