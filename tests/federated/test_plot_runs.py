"""`ferret plot`: pictures of runs, and the plans that they are drawn from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import SMALL

from ferret_ext.federated import plot_runs
from ferret_ext.federated.cli import main
from ferret_ext.federated.settings import ConfigError


def texts(path: Path) -> str:
    """What an SVG's comments say, where matplotlib writes each text that it draws as shapes."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    found = ElementTree.parse(path, parser).iter()
    return "\n".join(it.text or "" for it in found if it.tag is ElementTree.Comment)


@pytest.fixture(scope="module")
def by_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norm") / "by-norm"
    assert main(["simulate", *SMALL, "rounds=2", "ferret.allocation=norm", "--out", str(folder)]) == 0
    return folder


def test_one_run_is_drawn_into_its_folder(by_norm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(by_norm)]) == 0
    names = {path.name for path in (by_norm / "plots").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("loss", "time", "coordinates") for kind in ("png", "svg")}
    shown = capsys.readouterr().out
    for name in ("loss", "time", "coordinates"):
        assert f"plots/{name}.png, .svg" in shown
        assert (by_norm / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = texts(by_norm / "plots" / "coordinates.svg")
    assert "by-norm: 64 coordinates by block" in drawn
    assert "model.embed_tokens.weight" in drawn
    assert "round 2" in drawn
    assert "Time of a round by phase" in texts(by_norm / "plots" / "time.svg")


def test_several_runs_share_pictures(by_norm: Path, small_run: Path, tmp_path: Path) -> None:
    assert main(["plot", str(by_norm), str(small_run), "--out", str(tmp_path / "out")]) == 0
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names == {"loss", "time", "coordinates-1", "coordinates-2"}
    drawn = texts(tmp_path / "out" / "loss.svg")
    assert "by-norm" in drawn
    assert "evaluation loss" in drawn


def test_plans_follow_from_the_ledger(by_norm: Path, small_run: Path) -> None:
    """By norm they change after round 1, by size they do not; their digests are checked on the way."""
    first, second = plot_runs.plans_of(plot_runs._read(by_norm, "a"))
    assert [block.name for block in first.blocks] == [block.name for block in second.blocks]
    assert first != second
    assert first.K == second.K == 64
    by_size = plot_runs.plans_of(plot_runs._read(small_run, "b"))
    assert len(by_size) == 3
    assert len(set(by_size)) == 1


def test_plans_of_a_run_with_shared_seeds(tmp_path: Path) -> None:
    settings = ["ferret.seeds=shared-round", "ferret.coordinates=int8", "ferret.allocation=mse", "rounds=2"]
    assert main(["simulate", *SMALL, *settings, "--out", str(tmp_path / "run")]) == 0
    first, second = plot_runs.plans_of(plot_runs._read(tmp_path / "run", "a"))
    assert first != second


def test_a_run_under_way_is_drawn(by_norm: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(by_norm / name, tmp_path / name)
    assert plot_runs.save_plots([tmp_path], tmp_path / "plots") == ["loss", "time"]


def test_labels_are_as_short_as_can_be() -> None:
    folders = [Path("/r/ferret/seed-0"), Path("/r/fedavg/seed-0"), Path("/r/fedavg/seed-1")]
    assert plot_runs.labels(folders) == ["ferret/seed-0", "fedavg/seed-0", "fedavg/seed-1"]
    assert plot_runs.labels(folders[1:]) == ["seed-0", "seed-1"]
    with pytest.raises(ConfigError, match="got one twice"):
        plot_runs.labels([folders[0], folders[0]])


def test_what_cannot_be_drawn(by_norm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["plot", *arguments]) == 2
        return capsys.readouterr().err

    assert "expected a run's folder with metrics.jsonl" in refused(str(tmp_path))
    assert "give --out" in refused(str(by_norm), str(tmp_path))
    shutil.copy(by_norm / "config.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"round": 0}) + "\n")
    assert "expected at least one finished round" in refused(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{")
    assert "is damaged" in refused(str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "expected a folder that can be written" in refused(str(by_norm), "--out", str(tmp_path / "file"))
