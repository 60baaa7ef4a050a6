"""The study of rounds: its data outside English, settings that fit, and what its page makes of runs."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from languages import DATES, LANGUAGES, NAMES, dated, records, shuffled
from plans_study import Shapes, plan_of
from quality import FORMS
from rounds_page import plans_section, rounds_section, shares
from rounds_study import CASES, config_of

from ferret_ext.federated.coordinates import PACKINGS


def test_records_are_in_their_language() -> None:
    pytest.importorskip("babel", reason="the data set comes from Babel")
    assert dated("fr", 0)["output"] == "dimanche 1 janvier 1950"
    assert dated("ru", 1)["output"].startswith("понедельник, 2 января 1950")
    for language in LANGUAGES:
        of_language = records(language)
        assert len(of_language) == NAMES + DATES
        assert all(record["input"] != record["output"] for record in of_language)
    assert any(
        record == {"language": "de", "input": "Greece", "output": "Griechenland"} for record in all_names()
    )
    assert shuffled() == shuffled()


def all_names() -> list[dict[str, str]]:
    from languages import names

    return list(names("de"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.study}-{case.name}")
def test_every_case_is_a_run_that_can_be(case: Any) -> None:
    options = argparse.Namespace(model="builtin:tiny-llama", data={case.task: "somewhere"})
    config = config_of(options, case, 1)
    assert config.seed == 1
    for key, value in case.settings.items():
        *sections, name = key.split(".")
        holder: Any = getattr(config, sections[0]) if sections else config
        assert getattr(holder, name) == value
    names = [(other.task, other.study, other.name) for other in CASES]
    assert names.count((case.task, case.study, case.name)) == 1


@pytest.mark.parametrize("size", [96, 512, 4096])
def test_the_plan_auto_fills_its_bytes_with_its_own_number_of_blocks(size: int) -> None:
    sizes = [4096] * 6 + [64] * 9 + [32768]
    model = Shapes(
        [(f"p{i}", torch.empty(n, device="meta", requires_grad=True)) for i, n in enumerate(sizes)]
    )
    plan = plan_of(size, "auto", model)
    assert plan is not None
    assert plan_of(16, "tensor", model) is None
    used = PACKINGS["choice8"].code_bytes(plan.K) + len(plan.blocks) + 8
    assert size * 0.97 <= used <= size
    assert {form.granularity for form in FORMS} == {"auto", "tensor"}


def row(study: str, name: str, *last: float) -> dict[str, Any]:
    seconds = {"local": 1.5, "project": 0.5, "rebuild": 0.0}
    runs = {
        str(seed): {"losses": [4.0, loss], "bytes_up": 634.0, "bytes_down": 900.0, "seconds": seconds}
        for seed, loss in enumerate(last)
    }
    return {"task": "gsm8k", "study": study, "name": name, "runs": runs}


def test_shares_are_of_the_tasks_fedavg_with_the_same_seed() -> None:
    rows = [row("server", "fedavg", 2.0, 1.0), row("server", "ferret", 2.5, 2.5), row("steps", "T", 3.0)]
    assert [shares(each, rows) for each in rows] == [[1.0, 1.0], [0.75, 0.5], [0.5]]
    text = rounds_section(rows)
    assert (
        "| GSM8K | server's step | ferret | 2 | 2.500 | 62.5% | 50.0% .. 75.0% | 634 | 900 | 1.50 |" in text
    )
    assert "| GSM8K | local steps | T | 1 | 3.000 | 50.0% |  | 634 | 900 | 1.50 |" in text


def test_plans_that_cannot_be_are_said() -> None:
    made = {"model": "260K", "bytes": 128, "granularity": "auto", "K": 82, "L": 22, "columns": 5 * 10**12}
    text = plans_section([{"model": "260K", "bytes": 32, "granularity": "tensor"}, made])
    assert "| 260K | 32 | tensor | none: fewer coordinates than tensors |" in text
    assert "| 260K | 128 | auto | 22 | 82 |  |  | 100 (computed) |" in text
