"""`ferret inspect`: what is told of a file is what is in it, and errors take one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import read_metrics

from ferret_ext import Block, BlockPlan
from ferret_ext.federated import ledger, wire
from ferret_ext.federated.cli import main
from ferret_ext.federated.ledger import Ledger
from ferret_ext.federated.wire import Message


def inspect(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    assert main(["inspect", *map(str, paths)]) == 0
    return capsys.readouterr().out


def test_a_run_folder(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspect(capsys, small_run)
    rows = read_metrics(small_run)
    assert f"run {small_run}: 3 of 3 rounds, finished" in shown
    assert "algorithm=ferret, model=builtin:tiny-llama, data=builtin:gsm8k, rounds=3, seed=0" in shown
    assert f"{rows[-1]['eval_loss']:.4f} after round 3" in shown
    assert f"{sum(row['payload_bytes_up'] for row in rows):,} bytes up" in shown
    assert f"ledger {small_run / 'ledger'}: 4 records" in shown


def test_a_ledger_alone(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "some.name"
    shutil.copy(small_run / "ledger", alone)
    shown = inspect(capsys, alone)
    records = list(ledger.read(alone))
    assert f"4 records, {alone.stat().st_size:,} bytes, ferret, run {records[0].run.hex()}" in shown
    assert records[0].value("base", bytes).hex() in shown
    assert "no ledger.head beside it" in shown
    for record in records:
        assert record.weights.hex() in shown
    assert ledger.read_head(small_run / "ledger").sha256 in inspect(capsys, small_run / "ledger")  # type: ignore[union-attr]


def test_rejections_and_long_ledgers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Ledger.create(tmp_path / "ledger")
    none = np.array([], np.uint32)
    kept.append(
        Message("ferret", "record", bytes(8), 0, values={"base": bytes(32), "config": "{}", "broadcast": b""})
    )
    for round_ in range(1, 41):
        values: dict[str, wire.Value] = {
            "broadcast": b"",
            "clients": np.array([0, 7], np.uint32),
            "accepted": np.array([0], np.uint32),
            "rejected": np.array([7], np.uint32),
            "left_out": none,
            "reasons": [b"its norm is 12 times the median's"],
            "updates": [bytes(32)],
            "bytes_up": 1,
            "bytes_down": 1,
        }
        kept.append(Message("ferret", "record", bytes(8), round_, values=values))
    kept.close()
    lines = inspect(capsys, tmp_path / "ledger").splitlines()
    assert "  round 5: client 7 was rejected: its norm is 12 times the median's" in lines
    table = [line.split() for line in lines if line.split()[0].isdigit() or line.split()[0] == ".."]
    assert [row[0] for row in table] == [*map(str, range(10)), "..", *map(str, range(31, 41))]
    assert table[1][2:6] == ["2", "1", "0", "1"]


def test_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"seed": 9, "gammas": np.array([3.0, -4.0], np.float32), "updates": [b"ab", b"c"], "to": "all"}
    update = Message("ferret", "update", b"\1" * 8, 4, 2, 1.5, values=values)
    path = tmp_path / "update.bin"
    path.write_bytes(wire.encode(update))
    shown = inspect(capsys, path)
    assert f"message {path}: update of ferret, round 4, client 2, weight 1.5, " in shown
    assert "model or plan 0101010101010101" in shown
    assert "  gammas: float32 [2], -4 to 3, norm 5\n" in shown
    assert "  updates: 2 times bytes, 3 in all\n" in shown
    assert "  seed: 9\n" in shown


def test_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = BlockPlan((("a", 100), ("b", 600)), (Block("a", 0, 100, 5), Block("b", 512, 600, 20)))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    shown = inspect(capsys, tmp_path / "plan.json")
    assert "2 tensors of 700 elements in 2 blocks on 25 coordinates" in shown
    assert plan.digest() in shown
    assert [line.split() for line in shown.splitlines()[3:]] == [
        ["b", "600", "20", "30"],
        ["a", "100", "5", "20"],
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected a run's folder, a ledger, a message or a plan"),
        (b"hello", "expected a run's folder, a ledger, a message or a plan"),
        (b"FRET\xff", "is damaged or of another version"),
        (b'{"a": 1}', "expected the keys blocks, format, tensors"),
        (b"{", "is damaged or of another version"),
        (bytes(8) + b"FRET", "ledger: record 0"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert main(["inspect", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "which has no config.yaml and no ledger" in capsys.readouterr().err


def test_a_run_that_can_go_on_is_told_so_and_a_broken_one_is_not(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "metrics.jsonl", "ledger", "ledger.head"):
        shutil.copy(small_run / name, tmp_path)
    assert inspect(capsys, tmp_path).splitlines()[-1] == f"ferret resume {tmp_path} goes on"
    (tmp_path / "ledger").unlink()
    assert main(["inspect", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert f"ledger: {tmp_path / 'ledger'} is missing" in shown.err
    assert "not finished" in shown.out
    assert "resume" not in shown.out


def test_a_changed_ledger(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((small_run / "ledger").read_bytes())
    data[-100] ^= 1
    (tmp_path / "ledger").write_bytes(data)
    assert main(["inspect", str(tmp_path / "ledger")]) == 2
    assert "ledger: record 3 of" in capsys.readouterr().err
