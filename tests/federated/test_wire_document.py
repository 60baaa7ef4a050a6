"""docs/wire.md and the committed bytes of every message say the same, and so does a reader of a few lines."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gallery
import make_golden_wire
import msgpack
import numpy as np
import pytest

from ferret_ext.federated import wire

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "wire.md").read_text("utf-8")
GOLDEN = Path(__file__).with_name("golden_wire.txt").read_text("ascii").splitlines()
MESSAGES = {(name, what): bytes.fromhex(data) for name, what, data in map(str.split, GOLDEN)}
DTYPES = ["<f4", "<f2", "<f8", "bfloat16", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"]


def read(data: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Fields and values of a message, arrays as (dtype, shape, bytes), read from the document alone."""
    assert data[:5] == b"FRET\x05"
    size = struct.unpack_from("<I", data, 5)[0]
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    *fields, values = msgpack.unpackb(data[9 : 9 + size])
    left = data[9 + size : -4]

    def take(length: int) -> bytes:
        nonlocal left
        taken, left = left[:length], left[length:]
        return taken

    for name, value in values.items():
        if isinstance(value, msgpack.ExtType):
            unpacker = msgpack.Unpacker()
            unpacker.feed(value.data[1:] if value.code == 1 else value.data)
            lengths = tuple(unpacker)
            if value.code == 1:
                dtype = DTYPES[value.data[0]]
                values[name] = (dtype, lengths, take(int(np.prod(lengths)) * np.dtype(dtype).itemsize))
            else:
                parts = [take(length) for length in lengths]
                values[name] = parts[0] if value.code == 2 else parts
    assert left == b""
    return fields, values


def test_todays_messages_are_the_committed_ones() -> None:
    assert list(make_golden_wire.lines()) == GOLDEN


@pytest.mark.parametrize(("name", "what"), MESSAGES)
def test_committed_messages_are_read_alike_by_a_few_lines(name: str, what: str) -> None:
    data = MESSAGES[name, what]
    message = wire.decode(data)
    assert wire.encode(message) == data
    (kind, *fields), values = read(data)
    assert wire.KINDS[kind] == message.kind
    told = [message.algorithm, message.run, message.digest, message.weights]
    assert fields == [*told, message.round, message.client, message.weight]
    assert list(values) == list(message.values)
    for key, value in message.values.items():
        if isinstance(value, np.ndarray):
            assert values[key] == (value.dtype.str.removeprefix("|"), value.shape, value.tobytes())
        else:
            assert values[key] == value


@pytest.mark.parametrize("name", gallery.ALGORITHMS)
def test_a_replica_rebuilds_from_the_committed_broadcasts(name: str) -> None:
    algorithm = gallery.ALGORITHMS[name]()
    replica = algorithm.replicate(gallery.toy())
    for what in ("opening", "broadcast"):
        algorithm.rebuild(replica, MESSAGES[name, what])
    assert replica.weights == wire.decode(MESSAGES[name, "broadcast"]).weights != wire.NO_DIGEST


# ---- the document ----


def rows(*columns: str) -> Iterator[list[str]]:
    """The rows of the document's table with these columns."""
    heading = f"| {' | '.join(columns)} |\n"
    assert heading in DOCUMENT, heading
    for line in DOCUMENT.partition(heading)[2].splitlines()[1:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def overhead(data: bytes) -> int:
    """Bytes of a message beyond its payloads."""

    def payload(value: wire.Value) -> int:
        if isinstance(value, list):
            return sum(map(len, value))
        return (
            value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, bytes) else 0
        )

    return len(data) - sum(map(payload, wire.decode(data).values.values()))


TABLE = list(rows("algorithm", "message", "values, in their order", "bytes"))


def test_the_document_lists_every_message_of_every_algorithm() -> None:
    listed = {(name, what) for name, what, *_ in TABLE if name != "any"}
    same = {name for name in gallery.AVERAGED if f"`{name}`" in DOCUMENT} | {"fedavg"}
    assert same == set(gallery.AVERAGED)
    made = {(name, what) for name, what in MESSAGES if "record" not in what and what != "dissent"}
    made -= {(name, what) for name, what in made if "+" in name and what != "update"}
    assert {("fedavg" if name in same else name, what) for name, what in made} == listed


@pytest.mark.parametrize(("name", "what", "values", "size"), TABLE)
def test_the_documents_values_and_bytes_are_those_of_the_messages(
    name: str, what: str, values: str, size: str
) -> None:
    data = MESSAGES["ferret" if name == "any" else name, what]
    told = re.findall(r"`(\w+)` (\w+)", re.sub(r"`factors`[^,]*,|`0`, |, \.\.", "", values))
    got = wire.decode(data).values
    if name == "fedavg":
        got = {key: value for key, value in got.items() if key == "1"}
    assert told == [(key, _kind(value)) for key, value in got.items()]
    least = int(size.split()[0])
    if "update" in size:
        least += 3 * gallery.CLIENTS
    if "tensor" in size:
        least += 6 * 4
    assert overhead(data) == least


def _kind(value: wire.Value) -> str:
    return value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__


@pytest.mark.parametrize("name", gallery.ALGORITHMS)
def test_an_updates_overhead_is_144_bytes_at_most(name: str) -> None:
    """For rounds, clients and arrays of up to 65535; where each parameter is an array, but for these."""
    data = gallery.update(gallery.serve(name), 1, round=65535, client=65535)
    most, arrays = overhead(data), [v for v in wire.decode(data).values.values() if isinstance(v, np.ndarray)]
    told = [size for row, what, _, size in TABLE if (row, what) == (name, "update") and " to " in size]
    assert all(most == int(size.split()[-1]) for size in told)
    assert told or name in gallery.AVERAGED
    assert most - 6 * 4 <= 144 if name in gallery.AVERAGED else most + 2 * len(arrays) <= 144


@pytest.mark.parametrize(("count", "size"), [(127, 4), (128, 6), (65535, 6), (65536, 9)])
def test_what_an_array_takes(count: int, size: int) -> None:
    data = wire.encode(wire.Message("a", "update", bytes(8), 0, values={"x": np.zeros(count, np.uint8)}))
    none = wire.encode(wire.Message("a", "update", bytes(8), 0))
    assert len(data) - len(none) == count + len(b"\xa1x") + size


@pytest.mark.parametrize(
    ("which", "golden"), [("of round 0", "first-record"), ("of another round", "record")]
)
def test_the_documents_records_are_those_of_the_ledger(which: str, golden: str) -> None:
    table = {name: (values, size) for name, values, size in rows("record", "values, in their order", "bytes")}
    values, size = table[which]
    data = MESSAGES["ferret", golden]
    message = wire.decode(data)
    names = re.findall(r"`(\w+)` (\w+)", values)
    assert names == [(key, _kind(value)) for key, value in message.values.items()]
    more = 3 * 4 if golden == "record" else len(make_golden_wire.GENESIS.config) + 1
    assert overhead(data) == int(size.split()[0]) + more


def test_the_documents_words_are_the_codes() -> None:
    """What it says that errors say stands in the code that raises them."""
    folder = ROOT / "ferret_ext" / "federated"
    files = [path for part in (".", "algorithms", "secure") for path in (folder / part).glob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text("utf-8") for path in files))
    for _, words in rows("what", "words"):
        for phrase in re.findall("`([^`]+)`", words):
            parts = [part for part in re.split(r"\{name\}|\d+", phrase) if part.strip()]
            assert all(part in code for part in parts), phrase
