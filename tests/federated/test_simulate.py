"""`ferret simulate` from its command line to its run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

import ferret_ext
from ferret_ext.federated import models, wire
from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.cli import main
from ferret_ext.federated.engines import in_process
from ferret_ext.federated.engines.in_process import InProcessClients

UPDATE_HEADER = 103
SECONDS = {f"seconds_{part}" for part in ("local", "project", "rebuild", "server", "eval", "generate")}


def simulate(*arguments: str) -> int:
    return main(["simulate", *arguments])


def test_run_folder_holds_config_metrics_plot_and_model(small_run: Path) -> None:
    names = {path.name for path in small_run.iterdir()}
    partition = {f"partition.{suffix}" for suffix in ("json", "png", "svg")}
    files = {"config.yaml", "metrics.jsonl", "plot.png", "plot.svg", "run.json", "report.html", "model"}
    files |= {"ledger", "ledger.head"}
    assert names == files | partition
    about = json.loads((small_run / "run.json").read_text())
    assert about["peak_memory_bytes"] > 50e6
    assert {"torch", "threads", "processor"} <= about["environment"].keys()
    assert (small_run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((small_run / "config.yaml").read_text())["ferret"]["K"] == 64


def test_metrics_have_one_line_a_round(small_run: Path) -> None:
    rows: list[dict[str, Any]] = read_metrics(small_run)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    required = {"round", "eval_loss", "payload_bytes_up", "payload_bytes_down"}
    for row in rows:
        assert required | SECONDS <= set(row)
    for row in rows[1:]:
        assert len(row["clients"]) == 2
        assert row["payload_bytes_up"] == 2 * (UPDATE_HEADER + 4 * 64)
        assert row["seconds_local"] > 0 < row["seconds_project"]
        assert row["model_bytes"] == 4 * 107_520
    assert rows[0]["payload_bytes_up"] == rows[0]["payload_bytes_down"] == 0


def test_final_model_opens_in_transformers(small_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(small_run / "model")
    inputs = tokenizer("Question: ", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_repeated_run_gives_the_same_weights_to_the_bit(small_run: Path, tmp_path: Path) -> None:
    config = str(small_run / "config.yaml")
    assert simulate("--config", config, "--out", str(tmp_path / "again")) == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (small_run / weights).read_bytes()
    same = [
        {key: value for key, value in row.items() if key not in SECONDS}
        for folder in (small_run, tmp_path / "again")
        for row in read_metrics(folder)
    ]
    assert same[:4] == same[4:]
    assert simulate("--config", config, "--out", str(tmp_path / "other"), "seed=1") == 0
    assert (tmp_path / "other" / weights).read_bytes() != (small_run / weights).read_bytes()


def test_bytes_in_metrics_are_the_lengths_of_the_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: a client that sat out receives what it missed, and nothing twice."""
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    rounds_of: dict[int, list[int]] = {}
    original = InProcessClients.exchange

    def spy(
        self: InProcessClients, watcher: Any, round_: int, clients: list[int], server: Any
    ) -> list[Reply]:
        before = list(self._seen)
        replies = original(self, watcher, round_, clients, server)
        sent[round_] = sum(len(reply.payload) for reply in replies)
        received[round_] = sum(len(b) for c in clients for b in server.broadcasts_since(before[c]))
        for client, reply in zip(clients, replies, strict=True):
            assert wire.decode(reply.payload).client == client
            relayed = [wire.decode(b).round for b in server.broadcasts_since(before[client])]
            rounds_of.setdefault(client, []).extend(relayed)
        return replies

    monkeypatch.setattr(in_process.InProcessClients, "exchange", spy)
    assert simulate(*SMALL, "--out", str(tmp_path), "rounds=5", "client_fraction=0.25") == 0
    rows: list[dict[str, Any]] = read_metrics(tmp_path)[1:]
    assert {row["round"]: row["payload_bytes_up"] for row in rows} == sent
    assert {row["round"]: row["payload_bytes_down"] for row in rows} == received
    for rounds in rounds_of.values():
        assert rounds == list(range(len(rounds)))
    assert max(map(len, rounds_of.values())) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_simulate_keeps_the_models_dtype(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "run"
    assert simulate(*SMALL, "--out", str(out), "--rounds", "1", "--dtype", dtype) == 0
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_simulate_holds_records_out_where_there_is_no_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    records = [{"question": f"{i} + 1?", "answer": "" if i == 0 else str(i + 1)} for i in range(40)]
    data.write_text("\n".join(json.dumps(record) for record in records))
    assert simulate(*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--rounds", "1") == 0
    shown = capsys.readouterr().out
    assert "no test split, 4 training records are held out" in shown
    assert "1 with an empty response dropped" in shown


def test_simulate_gives_each_value_of_a_column_a_client(tmp_path: Path) -> None:
    """Also: a client with one record takes part like any other."""
    languages = ["C"] * 6 + ["Go"] * 3 + ["R"]
    for split in ("train", "test"):
        rows = [{"question": f"{i}?", "answer": f"{i}", "language": name} for i, name in enumerate(languages)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [*SMALL, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "client_fraction=1"]
    by_language = ["num_clients=none", "partition.kind=natural-id", "partition.column=language", "rounds=1"]
    assert simulate(*arguments, *by_language) == 0
    report = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert [(row["name"], row["examples"]) for row in report["clients"]] == [("C", 6), ("Go", 3), ("R", 1)]
    assert read_metrics(tmp_path / "run")[1]["clients"] == [0, 1, 2]


def test_simulate_prints_plain_lines_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*SMALL, "--out", str(tmp_path / "run"), "--rounds", "1") == 0
    shown = capsys.readouterr().out
    assert "round 0/1: evaluation loss" in shown
    assert "round 1/1: evaluation loss" in shown
    assert "partition: iid; clients: 4; training examples of each: 750" in shown
    assert "full model" in shown
    assert "860,160" in shown  # two clients' models
    assert "\x1b" not in shown
    assert max(map(len, shown.partition("full model")[0].splitlines()[6:])) <= 100


def test_simulate_leaves_torchs_settings_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert simulate(*SMALL, "--out", str(tmp_path / "run"), "--rounds", "1") == 0
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert simulate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ferret simulate: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rounds=0"], "rounds: expected an integer >= 1 and < 2^32, got '0'"),
        (["ronds=3"], "did you mean rounds?"),
        (
            ["ferret.K=2", "ferret.granularity=tensor"],
            "K must be at least the number of blocks, got K = 2 for 20 blocks",
        ),
        (["--model", "/absent"], "model: expected a folder or a hub name, got '/absent'"),
        (["--data", "absent.jsonl"], "data absent.jsonl: expected a file or a folder, found neither"),
        (["--data", "builtin:other"], "expected one of builtin:alpaca"),
        (["dataset.format=dolly"], "expected the column instruction, response, found answer, question"),
        (["dataset.max_length=4"], "expected records with a response and a prompt of at most 3 tokens"),
        (["num_clients=5000"], "num_clients: expected at most 3000 for 3000 training examples, got 5000"),
        (
            ["training.optim=sgd", "training.learning_rate=1e30"],
            "in round 1: training diverged, loss or weights are not finite",
        ),
    ],
)
def test_simulate_refuses_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, *SMALL, "--out", str(tmp_path / "run"), *arguments)


def test_simulate_needs_model_data_and_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model: expected a value, got none; give model=.." in refusal(capsys)
    assert "out: expected a value" in refusal(capsys, "--preset", "demo")


def test_simulate_keeps_a_folder_with_something_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "--overwrite replaces it" in refusal(capsys, *SMALL, "--out", str(out))
    assert simulate(*SMALL, "--out", str(out), "--rounds", "1", "--overwrite") == 0
    assert simulate(*SMALL, "--out", str(out), "--rounds", "1", "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert len(read_metrics(out)) == 2
    assert "which is a file" in refusal(capsys, *SMALL, "--out", str(out / "notes.txt"))


@pytest.mark.parametrize(
    "bad",
    [
        ["device=tpv"],
        ["--model", "/absent"],
        ["--data", "absent.jsonl"],
        ["ferret.K=2", "ferret.granularity=tensor"],
        ["robust.quorum=3"],
        ["robust.quorum=3", "num_clients=none"],
    ],
)
def test_refused_run_leaves_its_folder_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: list[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "model").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "plot.png", "model/model.safetensors"):
        (old / name).write_text(name)
    before = {path: path.read_text() for path in old.rglob("*.*")}
    refusal(capsys, *SMALL, "--out", str(old), "--overwrite", *bad)
    assert {path: path.read_text() for path in old.rglob("*.*")} == before
    refusal(capsys, *SMALL, "--out", str(new), *bad)
    assert not new.exists()


def test_simulate_refuses_its_folder_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    unfit = ["--model", "/absent", "--out"]
    assert "out: expected a new or empty folder" in refusal(capsys, *SMALL, *unfit, str(tmp_path))
    assert "is a file" in refusal(capsys, *SMALL, *unfit, str(tmp_path / "file" / "run"))
    assert "out: expected a folder that can be" in refusal(
        capsys, *SMALL, *unfit, str(tmp_path / ("x" * 300))
    )
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert "is not writable" in refusal(capsys, *SMALL, *unfit, str(tmp_path / "a" / "b"))


def test_simulate_refuses_weights_that_evaluate_to_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["rounds=1", "training.max_steps=1", "training.learning_rate=1e10", "evaluation.max_samples=4"]
    error = refusal(capsys, "--preset", "demo", *huge, "--out", str(tmp_path))
    assert "round 1: expected a finite evaluation loss, got nan" in error
    assert [row["round"] for row in read_metrics(tmp_path)] == [0]


def test_simulate_checks_columns_before_it_holds_records_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one record"}')
    arguments = [*SMALL, "--out", str(tmp_path / "run"), "--data", str(data)]
    assert "expected the columns" in refusal(capsys, *arguments)


@pytest.mark.parametrize("begun", [True, False])
def test_interrupted_run_names_the_metrics_that_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owner, name = (InProcessClients, "exchange") if begun else (models, "load")
    monkeypatch.setattr(owner, name, interrupt)
    assert simulate(*SMALL, "--out", str(tmp_path / "run")) == 130
    error = capsys.readouterr().err
    assert "ferret simulate: interrupted" in error
    assert ("metrics.jsonl holds the rounds so far" in error) == begun
    assert (tmp_path / "run" / "metrics.jsonl").exists() == begun


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ferret {ferret_ext.__version__}\n"


def test_flags_and_overrides_mix_in_any_order(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert (
        simulate("rounds=1", *SMALL, "--out", out, "evaluation.max_samples=2", "--ferret.basis", "uniform")
        == 0
    )
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["ferret"]["basis"] == "uniform"
    assert saved["evaluation"]["max_samples"] == 2


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        simulate("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--training.learning_rate", "--ferret.K", "--num_clients", "--overwrite"):
        assert flag in shown
