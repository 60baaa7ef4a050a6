"""Trackers, read back from what they wrote: every round once, with its numbers, also after an interrupt."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL, read_metrics

from ferret_ext.federated import trackers
from ferret_ext.federated.cli import main
from ferret_ext.federated.metrics import RoundMetrics

ALL = ("tensorboard", "wandb", "mlflow")
History = dict[int, float]  # round -> evaluation loss


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, whatever the environment names."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def once(pairs: list[tuple[int, float]]) -> History:
    history = dict(pairs)
    assert len(history) == len(pairs), f"a round is there twice: {pairs}"
    return history


def in_tensorboard(folder: Path) -> History:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return once([(it.step, it.value) for it in events.Scalars("eval/loss")])


def in_wandb(folder: Path) -> History:
    from wandb.proto.wandb_internal_pb2 import Record

    pairs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in logged(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if row:
                pairs.append((int(row["round"]), float(row["eval/loss"])))
    return once(pairs)


def logged(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: pieces with crc u32, length u16 and kind u8, 32 KiB a block."""
    block, head, place, record = 1 << 15, 7, 7, b""  # the file begins with 7 bytes of its own
    while place + head <= len(data):
        if block - place % block < head:
            place += block - place % block
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + head : place + head + length]
        place += head + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def in_mlflow(folder: Path) -> History:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(json.loads((folder / "trackers.json").read_text())["mlflow"]["id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["ferret.K"] == "64"
    return once([(it.step, it.value) for it in client.get_metric_history(run.info.run_id, "eval/loss")])


READERS: dict[str, Callable[[Path], History]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
}


def simulate(folder: Path, *more: str) -> int:
    return main(["simulate", *SMALL, "--out", str(folder), *more])


def check(folder: Path, name: str) -> None:
    expected = {row["round"]: row["eval_loss"] for row in read_metrics(folder)}
    assert READERS[name](folder) == pytest.approx(expected, rel=1e-6)


def needed(name: str) -> str:
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    return name


@pytest.mark.parametrize("name", ALL)
def test_an_interrupted_run_has_every_round_once(
    tmp_path: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ctrl-C before round 2 reached the tracker and after it reached metrics.jsonl, then --resume."""
    original = trackers.numbers_of

    def cut(metrics: RoundMetrics) -> dict[str, float]:
        if metrics.round == 2:
            raise KeyboardInterrupt
        return original(metrics)

    monkeypatch.setattr(trackers, "numbers_of", cut)
    assert simulate(tmp_path, f"trackers={needed(name)}") == 130
    assert len(read_metrics(tmp_path)) == 3
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert simulate(tmp_path, f"trackers={name}", "--resume") == 0
    check(tmp_path, name)
    assert (tmp_path / "ledger").read_bytes() == (small_run / "ledger").read_bytes()


def test_numbers_of_a_round(small_run: Path) -> None:
    row = read_metrics(small_run)[1]
    numbers = trackers.numbers_of(RoundMetrics.of_row(row))
    assert numbers["bytes/up"] == row["payload_bytes_up"]
    assert numbers["train/loss"] == row["train_loss"]
    assert numbers["clients/drawn"] == 2
    assert numbers["seconds/local"] == row["seconds_local"]
    first = trackers.numbers_of(RoundMetrics.of_row(read_metrics(small_run)[0]))
    assert "train/loss" not in first


def test_a_tracker_that_fails_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        newest, place = -1, "nowhere"

        def __init__(self, *_: object) -> None: ...

        def log(self, round_: int, numbers: object) -> None:
            if round_ == 1:
                raise OSError("the server\nis gone")

        def close(self, finished: bool) -> None:
            raise AssertionError("it is left alone")

    needed("tensorboard")
    monkeypatch.setitem(trackers.OPENERS, "tensorboard", Broken)
    assert simulate(tmp_path, "trackers=tensorboard") == 0
    shown = capsys.readouterr().out
    assert "tensorboard: nowhere" in shown
    assert shown.count("tensorboard is left alone from here: the server is gone; metrics.jsonl has") == 1
    assert len(read_metrics(tmp_path)) == 4


def test_a_tracker_that_cannot_be_opened_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> trackers.Tracker:
        raise RuntimeError("no key")

    needed("tensorboard")
    monkeypatch.setitem(trackers.OPENERS, "tensorboard", refuse)
    assert simulate(tmp_path, "trackers=tensorboard") == 2
    assert "error: trackers: tensorboard cannot be opened: no key" in capsys.readouterr().err


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("command", ["simulate", "compare"])
def test_a_missing_package_is_said_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    more = ["--variants", "ferret"] if command == "compare" else []
    settings = ["--model", "absent", "--data", "absent", "--out", str(out), f"trackers={name}"]
    assert main([command, *more, *settings]) == 2
    said = capsys.readouterr().err
    assert f"trackers: {name}: expected the package {name}, got: " in said
    assert f"pip install '.[{name}]'" in said
    assert not out.exists()


def test_names_of_trackers_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(tmp_path, "trackers=tensorbord") == 2
    assert "trackers: expected none or, with commas between them, tensorboard or" in capsys.readouterr().err
