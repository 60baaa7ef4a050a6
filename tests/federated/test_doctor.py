"""`ferret doctor`: a line for each thing that a run needs, and an exit status that scripts can use."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

import ferret_ext
from ferret_ext import known_answers
from ferret_ext.federated import doctor, dry_run
from ferret_ext.federated.cli import main
from ferret_ext.federated.doctor import Finding
from ferret_ext.federated.settings import ConfigError


def found(what: str, **asked: str) -> Finding:
    (finding,) = (it for it in doctor.examine(**asked) if it.what.startswith(what))
    return finding


def test_a_healthy_machine_gets_a_line_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "builtin:tiny-llama"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    for path in ferret_ext.cpu_capability()["available"]:
        count = len(known_answers.RECORDS)
        assert f"ok      streams on {path}: all {count} known answers, to the bit" in lines
    for what in ("versions", "extras", "processor", "CUDA", "memory", "disk"):
        assert sum(f" {what}: " in line for line in lines) == 1
    assert f"torch {torch.__version__}" in lines[0]


def test_extras_that_are_absent_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for extra, names in doctor.EXTRAS.items():
        (needs,) = re.findall(rf"^{extra} = \[(.*)\]$", project, re.MULTILINE)
        assert tuple(re.findall('"([a-z-]+)', needs)) == names
    monkeypatch.setattr(doctor, "version", lambda name: "7")
    monkeypatch.setattr(doctor, "_installed", lambda name: name not in ("rouge", "dp-accounting"))
    text = "rouge-score 7, flwr 7, cryptography 7, pycryptodome 7; for more, in the source tree, pip install "
    assert found("extras") == Finding("extras", "ok", f"peft 7, {text}'.[scores,privacy]'")
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    assert found("extras").text.startswith("none installed; for more, ")
    assert found("extras").verdict == "ok"


def test_wrong_bits_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = known_answers.RECORDS[0][:-4] + "beef"
    monkeypatch.setattr(known_answers, "RECORDS", (record, known_answers.RECORDS[1]))
    assert main(["doctor"]) == 1
    assert f"fails   streams on scalar: 1 of 2 known answers are wrong, the first: {record}" in (
        capsys.readouterr().out
    )


def test_the_path_in_use_stays(restored_isa: None) -> None:
    ferret_ext.set_cpu_isa("scalar")
    findings = list(doctor.examine())
    assert ferret_ext.cpu_capability()["isa"] == "scalar"
    if len(ferret_ext.cpu_capability()["available"]) > 1:
        (processor,) = (it for it in findings if it.what == "processor")
        assert processor.verdict == "warning"


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = "builtin:tiny-llama"
    assert found("memory", model=model).verdict == "ok"
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(dry_run, "free_disk", lambda path: 1_000)
    assert found("memory", model=model).verdict == "fails"
    assert "1.0 MB free; ferret simulate --dry-run" in found("memory", model=model).text
    assert found("disk", model=model).verdict == "fails"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    finding = found("model", model=str(tmp_path / "none"))
    assert finding.verdict == "fails"
    assert "does not exist" in finding.text


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert found("listening", listen=address).verdict == "fails"
        assert found("connecting", connect=address).verdict == "ok"
    assert found("listening", listen=address).verdict == "ok"
    refused = found("connecting", connect=address)
    assert refused.verdict == "fails"
    assert "is the server running" in refused.text


@pytest.mark.parametrize("address", ["9092", "host:", "host:http", "host:70000", "host:0", "host:٣"])
def test_addresses_that_are_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        doctor.parse_address(address)


@pytest.mark.cuda
def test_gpus_are_examined() -> None:
    assert found("streams on cuda:0").verdict == "ok"
    assert found("GPU 0").verdict == "ok"
