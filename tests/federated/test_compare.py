"""`ferret compare`: the same task for every variant, resumed where it stood; tables against sums by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, read_metrics

from ferret_ext.federated import compare, presets
from ferret_ext.federated.cli import main
from ferret_ext.federated.config import build
from ferret_ext.federated.plot_comparison import loss_limits
from ferret_ext.federated.presets import PRESETS
from ferret_ext.federated.settings import ConfigError

VARIANTS = ["fedavg", "ferret", "ferret-reference-code"]


def run_compare(out: Path, *more: str) -> int:
    variants = ["--variants", ",".join(VARIANTS)]
    return main(["compare", *SMALL, *variants, "--seeds", "3,4", "--out", str(out), *more])


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert run_compare(out, "rounds=2") == 0
    return out


def test_runs_are_those_of_simulate(comparison: Path, tmp_path: Path) -> None:
    """The same losses and bytes, since nothing but the process differs."""
    reference = ["algorithm=ferret", "ferret.mode=reference-code", "seed=4", "rounds=2"]
    assert main(["simulate", *SMALL, *reference, "--out", str(tmp_path / "run")]) == 0
    keys = ("eval_loss", "train_loss", "clients", "payload_bytes_up", "payload_bytes_down")
    ours, theirs = (
        [[row[key] for key in keys] for row in read_metrics(folder)]
        for folder in (comparison / "ferret-reference-code" / "seed-4", tmp_path / "run")
    )
    assert ours == theirs


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
def test_a_source_tree_in_the_way_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ferret_ext").mkdir()
    (tmp_path / "ferret_ext" / "__init__.py").write_text("raise ImportError('no native part')")
    monkeypatch.chdir(tmp_path)
    command = ["compare", *SMALL, "--variants", "ferret", "--seeds", "3", "--out", "out", "rounds=1"]
    assert main(command) == 0


def test_variants_share_model_data_and_clients(comparison: Path) -> None:
    for seed in (3, 4):
        runs = [read_metrics(comparison / variant / f"seed-{seed}") for variant in VARIANTS]
        assert len({run[0]["eval_loss"] for run in runs}) == 1
        assert len({str([row["clients"] for row in run]) for run in runs}) == 1
        holdings = {(comparison / name / f"seed-{seed}" / "partition.json").read_text() for name in VARIANTS}
        assert len(holdings) == 1


def test_table_sums_up_the_runs(comparison: Path) -> None:
    content = json.loads((comparison / "comparison.json").read_text())
    assert [row["variant"] for row in content["rows"]] == VARIANTS
    assert [(run["variant"], run["seed"]) for run in content["runs"]] == [
        (variant, seed) for seed in (3, 4) for variant in VARIANTS
    ]
    ferret = content["rows"][1]
    runs = [read_metrics(comparison / "ferret" / f"seed-{seed}") for seed in (3, 4)]
    finals = [run[-1]["eval_loss"] for run in runs]
    assert ferret["loss"] == pytest.approx(sum(finals) / 2)
    assert (ferret["lowest"], ferret["highest"]) == (min(finals), max(finals))
    turns = sum(len(row["clients"]) for run in runs for row in run[1:])
    assert ferret["bytes_up"] == sum(row["payload_bytes_up"] for run in runs for row in run) / turns
    assert ferret["peak_memory_bytes"] > 50e6
    text = (comparison / "comparison.md").read_text().splitlines()
    assert len(text) == 2 + len(VARIANTS)
    assert text[3].startswith("| ferret | ")
    assert {path.name for path in comparison.glob("comparison.*")} == {
        f"comparison.{suffix}" for suffix in ("json", "md", "png", "svg")
    }


def test_finished_runs_stay_and_the_others_are_made_again(
    comparison: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = comparison / "ferret" / "seed-3" / "metrics.jsonl"
    before = kept.stat().st_mtime_ns
    (comparison / "fedavg" / "seed-4" / "run.json").unlink()  # as if it had been killed
    assert run_compare(comparison, "rounds=2") == 0
    shown = capfd.readouterr().out
    assert shown.count("finished before") == 5
    assert "run 4 of 6: fedavg, seed 4\n" in shown
    assert kept.stat().st_mtime_ns == before
    assert (comparison / "fedavg" / "seed-4" / "run.json").exists()


def test_a_run_that_fails_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Adam is refused for float16 weights, which plain SGD is not."""
    settings = ["rounds=1", "dtype=float16", "training.optim=auto", "training.learning_rate=1e-4"]
    half = ["--variants", "fedit,ferret", "--out", str(tmp_path / "out"), *settings, "adapter.type=none"]
    assert main(["compare", *SMALL, *half]) == 2
    shown = capfd.readouterr()
    assert "ferret simulate: error: adapter.type: expected lora" in shown.err
    assert "left out: fedit, seed 0: the run failed; its error stands above" in shown.out
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["ferret"]


def test_finished_runs_of_other_settings_are_not_lost(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (comparison / "ferret" / "seed-4" / "metrics.jsonl").read_text()
    assert run_compare(comparison, "rounds=2", "ferret.K=65") == 2
    error = capsys.readouterr().err
    assert (
        "holds a finished run with ferret.K 64, expected 65; choose another folder, or --overwrite" in error
    )
    assert (comparison / "ferret" / "seed-4" / "metrics.jsonl").read_text() == before


def rounds(*losses: float) -> list[dict[str, Any]]:
    names = ("local", "project", "rebuild", "server")
    return [
        {
            "round": number,
            "eval_loss": loss,
            "scores": {},
            "clients": [0, 1],
            "payload_bytes_up": 10,
            "payload_bytes_down": 20,
            **{f"seconds_{name}": 1.0 for name in names},
        }
        for number, loss in enumerate(losses)
    ]


def made(variant: str, *losses: float) -> dict[str, Any]:
    return {"variant": variant, "seed": 0, "peak_memory_bytes": 2**20, "rounds": rounds(*losses)}


def test_rounds_to_a_target() -> None:
    runs = [
        made("a", 4.0, 3.0, 2.0),
        made("a", 4.0, 1.5, 1.0),
        made("b", 4.0, 3.9, 3.8),
        made("b", 4.0, 1, 1),
    ]
    a, b = compare.tabulate(runs, target=2.0)
    assert a.to_target == 1.5  # rounds 2 and 1
    assert b.to_target is None  # one seed never gets there
    assert (a.bytes_up, a.bytes_down, a.seconds_local, a.seconds_aggregate) == (5, 10, 0.5, 2)
    assert compare.default_target(runs) == 2.0
    assert "never" in compare.markdown([b], 2.0)


def test_compare_refuses_what_it_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "variants: expected some, got none" in capsys.readouterr().err
    for variants, said in (
        ("ferret,foo", "ferret-reference-code, ferret-shared-round, got 'foo'\n"),
        ("FedAvg", "got 'FedAvg'; did you mean fedavg?"),
        ("ferret-shared", "got 'ferret-shared'; did you mean ferret-shared-round?"),
    ):
        assert main(["compare", *SMALL, "--variants", variants, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "variants: expected some of ferret, fedavg" in error
        assert said in error
    assert not (tmp_path / "out").exists()


def every_variant() -> Iterable[tuple[str, str]]:
    return ((name, variant) for name in PRESETS for variant in presets.variants_of(name))


@pytest.mark.parametrize(("name", "variant"), list(every_variant()))
def test_presets_fit_every_variant(name: str, variant: str) -> None:
    settings = presets.settings_of(name, variant)
    config = build([("model", "m"), ("data", "d"), ("out", "o"), *settings])
    assert presets.variant_of(settings) == variant
    assert config.algorithm in (variant, "ferret")


def test_variants_stay_apart_whatever_the_command_line_says() -> None:
    own = [("ferret.mode", "reference-code")]
    assert presets.variant_of([*own, *presets.choice_of("ferret")]) == "ferret"
    assert presets.variant_of(own) == presets.REFERENCE_CODE
    own = [("ferret.seeds", "shared-round")]
    for variant in ("ferret", presets.REFERENCE_CODE, presets.SHARED_ROUND):
        assert presets.variant_of([*own, *presets.choice_of(variant)]) == variant
        assert build([("model", "m"), ("data", "d"), ("out", "o"), *own, *presets.choice_of(variant)])
    shared, kin = (presets.settings_of("small/gsm8k", name) for name in (presets.SHARED_ROUND, "ferret"))
    assert dict(shared) == {**dict(kin), "ferret.seeds": "shared-round"}


def test_command_line_wins_over_a_variants_settings(tmp_path: Path) -> None:
    def settings_of(variant: str) -> list[tuple[str, Any]]:
        own = [("model", "m"), ("data", "d"), ("out", "o"), ("server_learning_rate", 7.0)]
        return [*presets.settings_of("small/gsm8k", variant), *own]

    [run] = compare.plan(settings_of, ["ferret"], [5], tmp_path)
    assert (run.config.server_learning_rate, run.config.ferret.K, run.config.seed) == (7.0, 4096, 5)
    assert run.folder == tmp_path / "ferret" / "seed-5"
    with pytest.raises(ConfigError, match="algorithm: expected"):
        compare.plan(lambda _: [*settings_of("ferret"), ("algorithm", "x")], ["x"], [5], tmp_path)


def test_a_run_that_diverges_does_not_hide_the_others() -> None:
    def run(*losses: float) -> dict[str, Any]:
        return {"rounds": [{"eval_loss": loss} for loss in losses]}

    assert loss_limits([run(4.0, 3.0), run(4.0, 2.0)]) is None
    assert loss_limits([run(4.0, 3.0), run(4.0, 900.0)]) == (pytest.approx(2.7), 5.0)
