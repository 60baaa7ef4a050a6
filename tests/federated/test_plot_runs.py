"""`ferret plot`: pictures of runs, and the plans that they are drawn from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import SMALL

from ferret_ext.federated import models, plot_coordinates, plot_runs
from ferret_ext.federated.algorithms.ferret import first_plan
from ferret_ext.federated.cli import main
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.plot_coordinates import Coordinates
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
    expected = ("loss", "time", "coordinates", "partition")
    assert names == {f"{name}.{kind}" for name in expected for kind in ("png", "svg")}
    shown = capsys.readouterr().out
    for name in expected:
        assert f"plots/{name}.png, .svg" in shown
        assert (by_norm / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = texts(by_norm / "plots" / "coordinates.svg")
    assert "by-norm: 64 coordinates by block" in drawn
    assert "model.embed_tokens.weight" in drawn
    assert "round 2" in drawn
    assert "Time of a round by phase" in texts(by_norm / "plots" / "time.svg")
    assert "Who holds what" in texts(by_norm / "plots" / "partition.svg")


def test_several_runs_share_pictures(by_norm: Path, small_run: Path, tmp_path: Path) -> None:
    assert main(["plot", str(by_norm), str(small_run), "--out", str(tmp_path / "out")]) == 0
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names == {
        "loss",
        "time",
        *(f"{of}-{run}" for of in ("coordinates", "partition") for run in (1, 2)),
    }
    drawn = texts(tmp_path / "out" / "loss.svg")
    assert "by-norm" in drawn
    assert "evaluation loss" in drawn


def coordinates(folder: Path) -> Coordinates:
    run = plot_runs.read_run(folder, "a")
    return plot_coordinates.of_run(run.folder, run.config)


def test_coordinates_follow_from_the_ledger(by_norm: Path, small_run: Path) -> None:
    """By norm they begin by the root of the size and change after round 1, by size they do not change."""
    found, by_size = coordinates(by_norm), coordinates(small_run)
    first, second = found.counts
    assert first != second
    assert sum(first) == sum(second) == 64
    assert found.first == "round 1, by sqrt-size"
    assert found.blocks == by_size.blocks
    assert len(by_size.counts) == 3
    assert len(set(map(tuple, by_size.counts))) == 1
    plan = first_plan(
        FerretConfig(K=64, allocation="sqrt-size"), models.skeleton(models.TINY_LLAMA, "float32")
    )
    assert first == [block.k for block in plan.blocks]


def test_coordinates_of_a_run_with_shared_seeds(tmp_path: Path) -> None:
    settings = ["ferret.seeds=shared-round", "ferret.coordinates=int8", "ferret.allocation=mse", "rounds=2"]
    assert main(["simulate", *SMALL, *settings, "--out", str(tmp_path / "run")]) == 0
    first, second = coordinates(tmp_path / "run").counts
    assert first != second


def test_seeds_in_use_of_the_reference_codes_pool(tmp_path: Path) -> None:
    """With one client a round they are the seeds that it took: all for the largest update, two at least."""
    settings = ["ferret.mode=reference-code", "ferret.coordinates=auto", "ferret.basis=auto", "ferret.K=16"]
    run = [*SMALL, *settings, "rounds=2", "client_fraction=0.25", "--out", str(tmp_path / "run")]
    assert main(["simulate", *run]) == 0
    found = coordinates(tmp_path / "run")
    assert [max(counts) for counts in found.counts] == [16, 16]
    assert all(2 <= count <= 16 for counts in found.counts for count in counts)
    assert len({*found.counts[0]}) > 2
    assert main(["plot", str(tmp_path / "run")]) == 0
    drawn = texts(tmp_path / "run" / "plots" / "coordinates.svg")
    assert "run: seeds in use by block, of 16 in the pool" in drawn


def test_coordinates_of_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters need PEFT")
    settings = ["adapter.type=lora", "ferret.allocation=norm", "rounds=2", "--out", str(tmp_path / "run")]
    assert main(["simulate", *SMALL, *settings]) == 0
    assert all("lora" in name for name in coordinates(tmp_path / "run").blocks)


def test_what_is_not_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["simulate", *SMALL, "algorithm=fedavg", "rounds=1", "--out", str(folder)]) == 0
    (folder / "partition.json").unlink()
    assert main(["plot", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "run: no coordinates by block: fedavg has none\n" in shown
    assert "run: no picture of who holds what: there is no partition.json\n" in shown


def test_a_run_under_way_is_drawn(by_norm: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(by_norm / name, tmp_path / name)
    names, notes = plot_runs.save_plots([tmp_path], tmp_path / "plots")
    assert names == ["loss", "time"]
    assert [note.split(": ")[1] for note in notes] == [
        "no coordinates by block",
        "no picture of who holds what",
    ]


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
