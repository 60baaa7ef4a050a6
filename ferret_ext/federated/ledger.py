"""The ledger: what a run is made of, round by round, so that its model follows from its base, bit for bit.

A ledger is two files. `ledger` has a record for each round that counts, one after the other: u64 length
(little-endian), then a message of `wire` of kind "record". Round 0's record says what the run is, every other
one what the round was and what its clients were relayed:

    every record    previous bytes (SHA-256 of the record before, zeros for the first), broadcast bytes;
                    `weights` is the digest of the weights that the broadcast leads to
    round 0's       base bytes (SHA-256, see `digests.of_model`), config str (JSON)
    the others'     clients, left_out, accepted, rejected uint32; reasons list of bytes (UTF-8), one for each
                    rejected; updates list of bytes (SHA-256), one for each accepted; bytes_up, bytes_down
                    int; train_loss float, unless no client says one; epsilon, delta float where privacy is
                    promised

`ledger.head` says how many records and bytes of it count, and the last one's SHA-256. It is replaced once a
record is on the disk, and that makes the round count: what a crash has left behind the head was never there.
Records refer to the ones before by hash, so that the last hash stands for them all: no record can be changed,
left out or cut off unnoticed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from ferret_ext.federated import files, wire
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.wire import Message, WireError

HEAD_SUFFIX = ".head"
ZERO_HASH = bytes(32)
MAX_HEAD_FILE = 1024  # bytes
_LENGTH = struct.Struct("<Q")
_OPENING = {"previous": bytes, "broadcast": bytes, "base": bytes, "config": str}
_ROUND = {
    **dict.fromkeys(("previous", "broadcast"), bytes),
    **dict.fromkeys(("clients", "left_out", "accepted", "rejected"), np.ndarray),
    **dict.fromkeys(("reasons", "updates"), list),
    **dict.fromkeys(("bytes_up", "bytes_down"), int),
}

HELP = "take both files from a copy, or begin the run anew (ferret simulate --overwrite)"
OPTIONAL = ("train_loss", "epsilon", "delta")  # of every round but 0, floats


@dataclass(frozen=True)
class Head:
    """How much of a ledger counts. sha256: the last record's, in hexadecimal."""

    records: int
    bytes: int
    sha256: str


class Ledger:
    """A ledger that is written. One process at a time holds it; closing lets others in."""

    def __init__(self, path: Path, file: IO[bytes], head: Head, places: list[int]) -> None:
        self._path, self._file, self.head = path, file, head
        self._places = places  # where each record begins

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """An empty ledger, in place of a former one. Raises LedgerError."""
        with _speaking(path):
            file = _locked(path)
            _head_of(path).unlink(missing_ok=True)
            file.truncate(0)
        return cls(path, file, Head(0, 0, ZERO_HASH.hex()), [])

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """A ledger to go on with. Raises LedgerError, also where it has been tampered with."""
        head = read_head(path)
        if head is None:
            raise LedgerError(f"ledger: expected {_head_of(path)}, got none")
        _check_there(path, head)
        with _speaking(path):
            file = _locked(path)
        places = [0]
        for record in read(path):
            places.append(places[-1] + _LENGTH.size + len(wire.encode(record)))
        return cls(path, file, head, places[:-1])

    def __len__(self) -> int:
        return self.head.records

    def __getitem__(self, round_: int) -> Message:
        """The record of a round that counts. Raises LedgerError."""
        with _speaking(self._path):
            self._file.seek(self._places[round_])
            (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
            return wire.decode(self._file.read(length))

    def broadcast(self, round_: int) -> bytes:
        """What clients were relayed after a round that counts. Raises LedgerError."""
        return self[round_].value("broadcast", bytes)

    def append(self, record: Message) -> None:
        """Writes a record; once this returns, it counts. Raises LedgerError, and then it does not.

        `previous` is filled in here.
        """
        values = {"previous": bytes.fromhex(self.head.sha256), **record.values}
        record = replace(record, values=values)
        data = wire.encode(record)
        check(record)
        with _speaking(self._path):
            self._file.seek(self.head.bytes)  # whatever a crash has left there does not count
            self._file.truncate()
            self._file.write(_LENGTH.pack(len(data)))
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
            end = self.head.bytes + _LENGTH.size + len(data)
            head = Head(self.head.records + 1, end, hashlib.sha256(data).hexdigest())
            text = json.dumps(vars(head)) + "\n"
            files.replace(_head_of(self._path), lambda path: path.write_text(text, "utf-8"))
        self.head = head
        self._places.append(end - _LENGTH.size - len(data))

    def close(self) -> None:
        self._file.close()


def read(path: Path, head: str | None = None) -> Iterator[Message]:
    """The records that count, one after the other, once each is known to be whole and in its place.

    head: SHA-256 of the last record, in hexadecimal, as somebody else knows it. Without it and without
    `ledger.head`, all records are taken as they come. Raises LedgerError.
    """
    known = read_head(path)
    _check_there(path, known)
    previous, count, end = ZERO_HASH, 0, 0
    with _speaking(path), path.open("rb") as file:
        while known is None or count < known.records:
            data = _next(path, file, count, known)
            if data is None:
                break
            record = _record(path, data, count, previous)
            previous, count = hashlib.sha256(data).digest(), count + 1
            end += _LENGTH.size + len(data)
            yield record
    if known is not None and known.bytes != end:
        raise LedgerError(
            f"ledger: expected {known.records} records of {known.bytes} bytes in {path}, got {end} bytes; "
            f"{HELP}"
        )
    for expected in (known and known.sha256, head):
        if expected is not None and previous.hex() != expected:
            raise LedgerError(
                f"ledger: expected {path} to end with a record of SHA-256 {expected}, got {previous.hex()}: "
                f"records were changed or cut off; {HELP}"
            )


def read_head(path: Path) -> Head | None:
    """What `ledger.head` says, None where there is none. Raises LedgerError."""
    beside = _head_of(path)
    if not beside.exists():
        return None
    try:
        if not beside.is_file() or beside.stat().st_size > MAX_HEAD_FILE:
            raise ValueError(f"expected a file of at most {MAX_HEAD_FILE} bytes")
        said = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"ledger: {beside} cannot be read: {error}; {HELP}") from None
    kinds = {name: type(value) for name, value in said.items()} if isinstance(said, dict) else {}
    if (
        kinds != {"records": int, "bytes": int, "sha256": str}
        or min(said["records"], said["bytes"]) < 1
        or not re.fullmatch("[0-9a-f]{64}", said["sha256"])
    ):
        raise LedgerError(f"ledger: {beside} must say records, bytes and sha256, got {said!r:.80}; {HELP}")
    return Head(**said)


def _check_there(path: Path, known: Head | None) -> None:
    if path.is_file():
        return
    if known and not path.exists():
        raise LedgerError(f"ledger: {path} is missing, of which {_head_of(path).name} is there; {HELP}")
    raise LedgerError(f"ledger: expected a file, got {str(path)!r}, which is none")


def check(record: Message) -> None:
    """Raises WireError unless the record has what a record of its round must have, and nothing else."""
    fields: Mapping[str, type] = _ROUND if record.round else _OPENING
    record.only(*fields, optional=OPTIONAL if record.round else [])
    for name, kind in fields.items():
        record.value(name, kind)
    hashes = [record.value("previous", bytes)]
    if record.round == 0:
        hashes.append(record.value("base", bytes))
    else:
        hashes += record.value("updates", list)
        _check_round(record)
    if wrong := [one for one in hashes if len(one) != len(ZERO_HASH)]:
        raise WireError(f"hashes must have {len(ZERO_HASH)} bytes, got {len(wrong[0])}")


def _check_round(record: Message) -> None:
    sizes = {name: record.value(name, np.ndarray).size for name in ("clients", "left_out")}
    sizes["accepted"] = len(record.value("updates", list))
    sizes["rejected"] = len(record.value("reasons", list))
    for name, size in sizes.items():
        record.array(name, "<u4", (size,))
    for reason in record.value("reasons", list):
        try:
            reason.decode()
        except UnicodeDecodeError as error:
            raise WireError(f"reasons must be UTF-8: {error}") from None
    if min(record.value("bytes_up", int), record.value("bytes_down", int)) < 0:
        raise WireError("bytes_up and bytes_down must be at least 0")
    for name in OPTIONAL:
        if name in record.values:
            record.value(name, float)


def _next(path: Path, file: IO[bytes], count: int, known: Head | None) -> bytes | None:
    """The next record's bytes; None at the end of a ledger without a head."""
    prefix = file.read(_LENGTH.size)
    if not prefix and known is None:
        return None
    left = os.fstat(file.fileno()).st_size - file.tell()
    length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else left + 1
    if length > left:
        raise LedgerError(f"ledger: {path} is cut off in record {count}; {HELP}")
    return file.read(length)


def _record(path: Path, data: bytes, count: int, previous: bytes) -> Message:
    where = f"ledger: record {count} of {path}"
    try:
        record = wire.decode(data)
        if record.kind != "record" or record.round != count:
            raise WireError(f"must be the record of round {count}, got {record.kind} of round {record.round}")
        check(record)
        if record.value("previous", bytes) != previous:
            raise WireError("does not follow from the one before")
    except WireError as error:
        raise LedgerError(f"{where}: {error}; {HELP}") from None
    return record


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + HEAD_SUFFIX)


def _locked(path: Path) -> IO[bytes]:
    file: IO[bytes] = path.open("r+b" if path.exists() else "x+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LedgerError(f"ledger: {path} is being written by another process") from None
    return file


@contextmanager
def _speaking(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"ledger: {path} cannot be read or written: {error}; the rounds before are safe"
        ) from None
