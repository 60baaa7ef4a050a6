"""Runs that were interrupted and go on, and models rebuilt from a ledger, from the command line on."""

from __future__ import annotations

import json
import shutil
from functools import partialmethod
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, interrupted_after, read_metrics

from ferret_ext.federated import ledger
from ferret_ext.federated.cli import main
from ferret_ext.federated.config import build
from ferret_ext.federated.report import RunFolder

VARIANTS: dict[str, list[str]] = {
    "ferret": ["ferret.allocation=norm", "training.keep_state=true"],
    "ferret-bfloat16": [
        "dtype=bfloat16",
        "training.optim=sgd",
        "evaluation.generate_every=1",
        *["evaluation.scores=gsm8k-exact-match"],
    ],
    "reference-code": ["ferret.mode=reference-code", "ferret.pool_momentum=0.5"],
    "fedavg": ["algorithm=fedavg", "training.keep_state=true"],
    "fedit": ["algorithm=fedit", "training.optim=auto", "training.keep_state=true"],
    "fedkseed-pro": ["algorithm=fedkseed-pro", "zeroth_order.steps=3", "zeroth_order.candidate_seeds=20"],
    "decomfl": ["algorithm=decomfl"],
    "ferret-adam": ["server.optim=adam", "server_learning_rate=0.003", "ferret.allocation=norm"],
    "fedavg-momentum": ["algorithm=fedavg", "server.momentum=0.5", "server_learning_rate=0.5"],
}
WEIGHTS = Path("model") / "model.safetensors"


def simulate(out: Path, variant: str, *more: str) -> int:
    return main(
        [
            "simulate",
            *SMALL,
            "--out",
            str(out),
            "rounds=4",
            "ledger.snapshot_every=2",
            *VARIANTS[variant],
            *more,
        ]
    )


def told(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder)
    return [{key: row[key] for key in row if not key.startswith("seconds_")} for row in rows]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_goes_on_to_the_same_bits_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if variant == "fedit":
        pytest.importorskip("peft", reason="adapters need PEFT")
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    assert simulate(alone, variant) == 0
    interrupted_after(monkeypatch, 3)
    assert simulate(cut, variant) == 130
    assert f"holds the rounds so far; ferret resume {cut} goes on from there" in capsys.readouterr().err
    assert len(read_metrics(cut)) == 3
    assert main(["resume", str(cut)]) == 0
    assert told(cut) == told(alone)
    for name in (WEIGHTS, "ledger", "ledger.head"):
        assert (cut / name).read_bytes() == (alone / name).read_bytes()
    if (alone / "samples.jsonl").exists():
        assert (cut / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    assert main(["replay", "builtin:tiny-llama", str(cut), str(tmp_path / "replayed")]) == 0
    assert (tmp_path / "replayed" / "model.safetensors").read_bytes() == (alone / WEIGHTS).read_bytes()


def test_replay_gives_the_model_after_any_round(tmp_path: Path) -> None:
    """The model after round 2 of 4 is that of a run of two rounds."""
    simulate(tmp_path / "two", "ferret", "rounds=2")
    simulate(tmp_path / "four", "ferret")
    shutil.copy(tmp_path / "four" / "ledger", tmp_path / "lonely")
    arguments = [
        "replay",
        "builtin:tiny-llama",
        str(tmp_path / "lonely"),
        str(tmp_path / "out"),
        "--round",
        "2",
    ]
    assert main(arguments) == 0
    expected = (tmp_path / "two" / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_seconds_of_a_round_whose_evaluation_was_cut_off_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_after(monkeypatch, 2)
    assert simulate(tmp_path, "ferret") == 130
    pending = json.loads((tmp_path / "pending.json").read_text())
    assert simulate(tmp_path, "ferret", "--resume") == 0
    row = read_metrics(tmp_path)[2]
    assert pending.pop("round") == 2
    assert {key: row[key] for key in pending} == pending
    assert row["seconds_local"] > 0  # type: ignore[operator]
    assert not (tmp_path / "pending.json").exists()


def test_damaged_snapshots_and_lost_metrics_only_cost_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path / "alone", "ferret")
    cut = tmp_path / "cut"
    interrupted_after(monkeypatch, 4)
    simulate(cut, "ferret")
    (snapshot,) = (cut / "snapshots").glob("round-2.safetensors")
    data = bytearray(snapshot.read_bytes())
    data[-100] ^= 1
    snapshot.write_bytes(data)
    rows = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text(rows[0] + rows[1] + rows[2][:50])
    assert simulate(cut, "ferret", "--resume") == 0
    assert told(cut) == told(tmp_path / "alone")
    assert (cut / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_resume_begins_a_run_that_has_not_begun_and_leaves_a_finished_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(tmp_path, "ferret", "--resume") == 0
    before = (tmp_path / WEIGHTS).stat().st_mtime_ns
    capsys.readouterr()
    assert main(["simulate", "--out", str(tmp_path), "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == before


def test_a_run_that_dies_while_it_begins_anew_can_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first death was before the ledger's head, the second may be before any removal or file of the
    second beginning."""
    config = build([("model", "toy"), ("data", "toy"), ("out", str(tmp_path / "run"))])
    for deaths in count():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        RunFolder(config, resume=True).begin()
        for name in ("metrics.jsonl", "samples.jsonl", "ledger", ".ledger.head.new"):
            (tmp_path / "run" / name).write_text("as far as it came\n")
        try:
            with monkeypatch.context() as patch:
                dies_after(deaths, patch)
                RunFolder(config, resume=True).begin()
            break
        except KeyboardInterrupt:
            RunFolder(config, resume=True)
    assert deaths > 10


def dies_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets so many calls that change files happen, and raises KeyboardInterrupt at the next one."""
    left = iter(range(calls))

    def dying(path: Path, call: Any, *args: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(path, *args, **named)

    for name in ("unlink", "mkdir", "write_text"):
        monkeypatch.setattr(Path, name, partialmethod(dying, getattr(Path, name)))


def test_another_run_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(monkeypatch, 2)
    simulate(tmp_path, "ferret")
    before = (tmp_path / "ledger").read_bytes()
    assert simulate(tmp_path, "ferret", "--resume", "seed=1") == 2
    assert "seed: expected 0, as in the run that" in capsys.readouterr().err
    assert simulate(tmp_path, "ferret") == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "ledger").read_bytes() == before


def test_settings_that_were_changed_in_the_folder_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(monkeypatch, 2)
    simulate(tmp_path, "ferret")
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text().replace("learning_rate: 0.01\n", "learning_rate: 0.02\n"))
    assert main(["resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"training.learning_rate: expected 0.01, as in the run that '{tmp_path}' has part of" in said
    assert "got 0.02; a run is resumed with its own settings" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--round", "9"], "round: expected 0 to 3, which the ledger has, got 9"),
        (["--head", "ab"], "to end with a record of SHA-256 ab"),
    ],
)
def test_replay_refuses_what_the_ledger_does_not_have(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["replay", "builtin:tiny-llama", str(small_run), str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_replay_refuses_another_base(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_run / "model"  # the tuned one
    assert main(["replay", str(other), str(small_run), str(tmp_path / "out")]) == 2
    assert "expected the base model of SHA-256" in capsys.readouterr().err


def test_records_say_what_came_of_their_rounds(small_run: Path) -> None:
    opening, *records = ledger.read(small_run / "ledger")
    assert json.loads(opening.value("config", str))["ferret"]["K"] == 64
    for record, row in zip(records, read_metrics(small_run)[1:], strict=True):
        assert record.array("clients", "<u4", (2,)).tolist() == row["clients"]
        assert record.value("bytes_up", int) == row["payload_bytes_up"]
        assert record.value("train_loss", float) == row["train_loss"]
