"""The ledger's file: what was written comes back, and nothing else does."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferret_ext.federated import ledger, wire
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.ledger import Ledger
from ferret_ext.federated.wire import Message


def record(round_: int) -> Message:
    values: dict[str, wire.Value] = {"broadcast": b"x" * (10 + round_)}
    if round_ == 0:
        values |= {"base": bytes(32), "config": "{}"}
    else:
        clients = np.arange(3, dtype=np.uint32)
        values |= dict.fromkeys(("clients", "accepted"), clients)
        values |= dict.fromkeys(("left_out", "rejected"), clients[:1])
        values |= {"reasons": ["späť".encode()], "updates": [bytes(32)] * 3, "bytes_up": 7, "bytes_down": 0}
    return Message("ferret", "record", bytes(8), round_, values=values)


def written(path: Path, rounds: int = 4) -> list[Message]:
    kept = Ledger.create(path)
    for round_ in range(rounds):
        kept.append(record(round_))
    kept.close()
    return list(ledger.read(path))


def test_records_come_back_in_order_each_with_the_hash_of_the_one_before(tmp_path: Path) -> None:
    records = written(tmp_path / "ledger")
    assert [it.round for it in records] == [0, 1, 2, 3]
    assert [it.value("broadcast", bytes) for it in records] == [b"x" * (10 + r) for r in range(4)]
    previous = bytes(32)
    for it in records:
        assert it.value("previous", bytes) == previous
        previous = hashlib.sha256(wire.encode(it)).digest()
    head = json.loads((tmp_path / "ledger.head").read_text())
    size = (tmp_path / "ledger").stat().st_size
    assert head == {"records": 4, "bytes": size, "sha256": previous.hex()}


def test_layout_is_as_documented(tmp_path: Path) -> None:
    records = written(tmp_path / "ledger", 2)
    encoded = [wire.encode(it) for it in records]
    expected = b"".join(struct.pack("<Q", len(data)) + data for data in encoded)
    assert (tmp_path / "ledger").read_bytes() == expected


def test_a_ledger_goes_on_where_it_ended(tmp_path: Path) -> None:
    written(tmp_path / "ledger")
    kept = Ledger.open(tmp_path / "ledger")
    kept.append(record(4))
    kept.close()
    whole = written(tmp_path / "at once", 5)
    assert [wire.encode(it) for it in ledger.read(tmp_path / "ledger")] == [wire.encode(it) for it in whole]
    assert (tmp_path / "ledger").read_bytes() == (tmp_path / "at once").read_bytes()


def test_what_a_crash_left_behind_the_head_was_never_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + struct.pack("<Q", 500) + b"torn")
    assert len(list(ledger.read(path))) == 4
    kept = Ledger.open(path)
    kept.append(record(4))
    kept.close()
    assert [it.round for it in ledger.read(path)] == [0, 1, 2, 3, 4]
    assert path.read_bytes().startswith(whole)


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    written(path, 2)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(LedgerError, match="take both files from a copy, or begin the run anew"):
            list(ledger.read(path))


def test_any_other_length_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    written(path, 2)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LedgerError, match="cut off in record"):
            list(ledger.read(path))


def split(path: Path) -> list[bytes]:
    """The ledger's records with their lengths."""
    data, found = path.read_bytes(), []
    while data:
        end = 8 + struct.unpack_from("<Q", data)[0]
        found.append(data[:end])
        data = data[end:]
    return found


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 2, 1, 3], "record 1 .*: wire: must be the record of round 1, got record of round 2"),
        ([0, 1, 3], "record 2 .* got record of round 3"),
        ([0, 0, 1, 2], "record 1 .* got record of round 0"),
    ],
)
def test_other_orders_are_noticed(tmp_path: Path, order: list[int], message: str) -> None:
    path = tmp_path / "ledger"
    written(path)
    parts = split(path)
    path.write_bytes(b"".join(parts[i] for i in order))
    with pytest.raises(LedgerError, match=message.replace("wire: ", "")):
        list(ledger.read(path))


def test_a_record_of_another_ledger_is_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger", tmp_path / "other"
    written(path)
    kept = Ledger.create(other)
    for round_ in range(4):
        theirs = record(round_)
        kept.append(dataclasses.replace(theirs, values={**theirs.values, "broadcast": b"y"}))
    kept.close()
    path.write_bytes(b"".join([*split(path)[:2], *split(other)[2:]]))
    with pytest.raises(LedgerError, match=r"record 2 of .*: does not follow from the one before"):
        list(ledger.read(path))


def test_a_ledger_cut_with_its_head_is_noticed_by_who_knows_the_hash(tmp_path: Path) -> None:
    """A ledger alone cannot tell that records are missing at its end; the head or a known hash can."""
    path = tmp_path / "ledger"
    records = written(path)
    true = hashlib.sha256(wire.encode(records[-1])).hexdigest()
    path.write_bytes(b"".join(split(path)[:3]))
    with pytest.raises(LedgerError, match="cut off in record 3"):
        list(ledger.read(path))
    (tmp_path / "ledger.head").unlink()
    assert len(list(ledger.read(path))) == 3
    with pytest.raises(LedgerError, match="records were changed or cut off"):
        list(ledger.read(path, head=true))


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", '{"records": 1}', '{"records": 0, "bytes": 1, "sha256": ""}', '"x"', "1"]
)
def test_a_damaged_head_is_named(tmp_path: Path, text: str) -> None:
    written(tmp_path / "ledger")
    (tmp_path / "ledger.head").write_text(text)
    with pytest.raises(LedgerError, match=r"ledger\.head (cannot be read|must say records).*; take both"):
        Ledger.open(tmp_path / "ledger")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"expected a file, got '.*absent', which is none"):
        list(ledger.read(tmp_path / "absent"))
    with pytest.raises(LedgerError, match=r"expected .*absent.head, got none"):
        Ledger.open(tmp_path / "absent")
    written(tmp_path / "ledger")
    (tmp_path / "ledger").unlink()
    for opened in (Ledger.open, lambda path: list(ledger.read(path))):
        with pytest.raises(LedgerError, match=r"ledger is missing, of which ledger\.head is there; take"):
            opened(tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    kept = Ledger.create(tmp_path / "ledger")
    kept.append(record(0))
    for other in (Ledger.open, Ledger.create):
        with pytest.raises(LedgerError, match="is being written by another process"):
            other(tmp_path / "ledger")
    assert len(list(ledger.read(tmp_path / "ledger"))) == 1
    kept.close()
    Ledger.open(tmp_path / "ledger").close()


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_loses_no_record_that_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    path = tmp_path / "ledger"
    kept = Ledger.create(path)
    kept.append(record(0))

    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        with pytest.raises(LedgerError, match=f"{os.strerror(code)}.*; the rounds before are safe"):
            kept.append(record(1))
    assert [it.round for it in ledger.read(path)] == [0]
    kept.append(record(1))
    assert [it.round for it in ledger.read(path)] == [0, 1]


def test_a_full_disk_in_mid_write(tmp_path: Path) -> None:
    """For real: the process may write files of 2,000 bytes at most."""
    path = tmp_path / "ledger"
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert 3 < count < 30
    assert [it.round for it in ledger.read(path)] == list(range(count))


def write_until_full(path: Path) -> int:
    """Records that count when the first does not fit any more."""
    kept = Ledger.create(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    for round_ in range(1000):
        try:
            kept.append(record(round_))
        except LedgerError:
            return round_
    raise AssertionError("the limit has no effect")


if __name__ == "__main__":
    print(write_until_full(Path(sys.argv[1])))
