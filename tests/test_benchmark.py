"""The benchmark counts what it says, and its sections, JSON and plot fit together. Nothing here is timed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cpu import QUICK, SECTIONS, Bench
from cases import both_cases, plan_cases
from plot_cpu import save_plot
from rivals import rivals
from timer import measure_in_turns, write

TINY = replace(
    QUICK,
    seconds=0.0,
    numel=3000,
    columns=(1, 5),
    few_columns=(3,),
    basis_numel=1000,
    memory_numel=5000,
    memory_columns=(2,),
    plan_blocks=3,
    rival_numel=1000,
    rival_columns=(4,),
    scaling_numels=(1000, 2000),
    scaling_columns=(1, 4),
    scaling_call=0.0,
)


@pytest.fixture(scope="module")
def bench() -> Bench:
    """All sections, on one and two threads."""
    before = torch.get_num_threads()
    bench = Bench(TINY, [1, 2])
    for section in SECTIONS.values():
        section(bench)
    torch.set_num_threads(before)
    return bench


def rows(bench: Bench, section: str) -> list[dict]:
    return [row for row in bench.rows if row["section"] == section]


def test_measure_in_turns_takes_turns() -> None:
    order: list[str] = []
    first, second = measure_in_turns(
        [lambda: order.append("a"), lambda: order.append("b")], seconds=0, least=3
    )
    assert "".join(order) == "ab" + "ababab"
    assert first.calls == second.calls == 3
    assert first.fastest <= first.median <= first.slowest


def test_cases_count_elements_words_and_bytes() -> None:
    project, apply = both_cases(torch.zeros(1000, dtype=torch.bfloat16), 64, "uniform")
    assert (project.elements, project.words) == (64000, 16000)
    assert (project.bytes_read, project.bytes_written) == (2000, 0)
    assert (apply.bytes_read, apply.bytes_written) == (2000, 2000)
    project, apply = plan_cases([1000, 200], [3, 8])
    assert project.elements == apply.elements == 1000 * 3 + 200 * 8
    assert (project.bytes_read, project.bytes_written) == (2 * 4800, 0)
    assert (apply.bytes_read, apply.bytes_written) == (4800, 4800)


def test_every_section_gives_rows_on_every_number_of_threads(bench: Bench) -> None:
    for section in SECTIONS:
        threads = {row["threads"] for row in rows(bench, section)}
        assert threads == ({1} if section in ("rivals", "paths") else {1, 2})


def test_rows_have_rates_shares_and_ratios(bench: Bench) -> None:
    for row in bench.rows:
        if row["section"] in ("rivals", "scaling"):
            continue
        assert row["rate"] == pytest.approx(row["numel"] * row["K"] / row["timing"].median)
        writes = row["what"].startswith(("reconstruct_", "apply_"))
        assert row["shares"].keys() == {"philox", "read", *(["update"] if writes else [])}
        assert ("1 thread" in row["ratios"]) == (row["threads"] == 2)
    for row in rows(bench, "dtypes"):
        assert ("float32" in row["ratios"]) == (row["dtype"] != "float32")
    for row in rows(bench, "plans"):
        assert ("one block" in row["ratios"]) == ("3 blocks" in row["what"])


def test_rivals_are_compared_with_project(bench: Bench) -> None:
    ours, *others = rows(bench, "rivals")
    assert ours["what"] == "project"
    assert {row["what"] for row in others} >= {f"rival: {name}" for name in rivals()}
    for row in others:
        assert row["ratios"] == {"project": pytest.approx(row["rate"] / ours["rate"])}


def test_scaling_leaves_out_calls_that_take_too_long(bench: Bench) -> None:
    """None may take any time here, but those at the smallest d are measured whatever they take."""
    for row in rows(bench, "scaling"):
        assert (row["rate"] is None) == (row["timing"] is None) == (row["numel"] == 2000)


def test_json_is_written_and_drawn(bench: Bench, tmp_path: Path) -> None:
    write(tmp_path / "new" / "run.json", [*bench.yardsticks.rows, *bench.rows], isa="some path")
    run = json.loads((tmp_path / "new" / "run.json").read_text())
    assert run["machine"].keys() >= {"processor", "torch", "commit", "isa"}
    assert len(run["rows"]) == len(bench.yardsticks.rows) + len(bench.rows)
    save_plot(run, 2, tmp_path / "plots" / "scaling")
    assert (tmp_path / "plots" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "plots" / "scaling.svg").read_text()
    with pytest.raises(ValueError, match="scaling on 3 threads"):
        save_plot(run, 3, tmp_path / "scaling")
