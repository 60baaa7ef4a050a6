"""Messages: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ferret_ext.federated import wire
from ferret_ext.federated.wire import BFLOAT16, Message, WireError

DIGEST = bytes(range(8))
RUN, WEIGHTS = b"the run.", b"weights."
UPDATE_HEADER = 103  # of Ferret's, with a seed of 64 bits and a short client number

plain = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=10),
    st.binary(max_size=10),
    st.lists(st.binary(max_size=10), max_size=3),
)
names = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=8)
shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> wire.Array:
    dtype = draw(st.sampled_from(wire.DTYPES))
    shape = draw(shapes)
    if dtype == BFLOAT16:
        words = draw(npst.arrays("<u2", shape, elements=st.integers(0, 0x7F7F)))
        return words.view(BFLOAT16)
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return draw(npst.arrays(dtype, shape, elements=finite))


messages = st.builds(
    Message,
    algorithm=names,
    kind=st.sampled_from(wire.KINDS),
    digest=st.binary(min_size=8, max_size=8),
    round=st.integers(0, 2**32 - 1),
    client=st.integers(0, 2**32 - 1),
    weight=st.floats(min_value=1e-9, max_value=1e9),
    values=st.dictionaries(names, plain | arrays(), max_size=4),
    run=st.binary(min_size=8, max_size=8),
    weights=st.binary(min_size=8, max_size=8),
)


def update(**changed: Any) -> Message:
    values = {"contract": 0x10001, "seed": 2**63 + 2, "gammas": np.arange(-2, 3, dtype=np.float32)}
    message = Message("ferret", "update", DIGEST, 3, 2, 1.0, values, RUN, WEIGHTS)
    return dataclasses.replace(message, **changed)


def broadcast() -> Message:
    sent = [wire.encode(update(client=client)) for client in (0, 1)]
    return Message("ferret", "broadcast", DIGEST, 3, values={"step": 0.3, "updates": sent})


def comparable(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value), repr(value)


def fields(message: Message) -> dict[str, object]:
    values = [(name, comparable(value)) for name, value in message.values.items()]
    return {**vars(message), "values": values}


@given(messages)
def test_message_round_trip(message: Message) -> None:
    data = wire.encode(message)
    assert fields(wire.decode(data)) == fields(message)
    assert wire.encode(wire.decode(data)) == data


def test_layout_is_as_documented() -> None:
    digests = b"".join(b"\xc4\x08" + digest for digest in (RUN, DIGEST, WEIGHTS))
    head = bytes([0x99, 0, 0xA6]) + b"ferret" + digests + bytes([3, 2])
    head += b"\xcb" + struct.pack(">d", 1.0) + b"\x83"
    head += b"\xa8contract\xce\x00\x01\x00\x01" + b"\xa4seed\xcf" + struct.pack(">Q", 2**63 + 2)
    head += b"\xa6gammas\xd5\x01" + b"\x00\x05"
    body = b"FRET\x05" + struct.pack("<I", len(head)) + head + struct.pack("<5f", -2, -1, 0, 1, 2)
    data = wire.encode(update())
    assert data == body + struct.pack("<I", zlib.crc32(body))
    assert len(data) == UPDATE_HEADER + 4 * 5


def test_layout_of_lists_and_bytes_is_as_documented() -> None:
    message = Message("a", "broadcast", DIGEST, 0, values={"l": [b"xy", b"z"], "b": b"uvw", "i": -1})
    digests = b"".join(b"\xc4\x08" + digest for digest in (bytes(8), DIGEST, bytes(8)))
    head = bytes([0x99, 1, 0xA1]) + b"a" + digests + bytes([0, 0])
    head += b"\xcb" + struct.pack(">d", 1.0) + b"\x83"
    head += b"\xa1l\xd5\x03\x02\x01\xa1b\xd4\x02\x03\xa1i\xff"
    body = b"FRET\x05" + struct.pack("<I", len(head)) + head + b"xyzuvw"
    assert wire.encode(message) == body + struct.pack("<I", zlib.crc32(body))


def test_bfloat16_travels_as_its_bits() -> None:
    words = np.array([0x3F80, 0xC000, 0x0001], "<u2")
    data = wire.encode(update(values={"w": words.view(BFLOAT16)}))
    assert words.tobytes() in data
    got = wire.decode(data).values["w"]
    assert isinstance(got, np.ndarray)
    assert got.dtype == BFLOAT16
    assert got.view("<u2").tolist() == words.tolist()


def test_arrays_of_other_strides_and_byte_orders_travel_as_their_values() -> None:
    values = np.arange(12, dtype=">f4").reshape(3, 4).T
    got = wire.decode(wire.encode(update(values={"w": values}))).values["w"]
    assert isinstance(got, np.ndarray)
    assert got.tolist() == values.tolist()
    assert got.flags.writeable


@pytest.mark.parametrize("message", [update(), broadcast()], ids=["update", "broadcast"])
def test_any_changed_byte_is_refused(message: Message) -> None:
    data = wire.encode(message)
    for at in range(len(data)):
        for flip in (1, 128, 255):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(WireError):
                wire.decode(bytes(damaged))


@pytest.mark.parametrize("message", [update(), broadcast()], ids=["update", "broadcast"])
def test_any_other_length_is_refused(message: Message) -> None:
    data = wire.encode(message)
    for length in range(len(data)):
        with pytest.raises(WireError):
            wire.decode(data[:length])
    with pytest.raises(WireError, match="checksum"):
        wire.decode(data + b"\0")
    with pytest.raises(WireError, match="must end after its payloads, got 1 more bytes"):
        wire.decode(sealed(data[:-4] + b"\0"))


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def framed(head: bytes, payload: bytes = b"") -> bytes:
    return sealed(b"FRET\x05" + struct.pack("<I", len(head)) + head + payload)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, sealed(noise), framed(noise), framed(noise[:20], noise[20:])):
        with pytest.raises(WireError):
            wire.decode(data)


@given(st.data())
def test_a_changed_head_under_a_right_checksum_is_refused_or_canonical(data: st.DataObject) -> None:
    """No other error than WireError, and whatever is accepted has no second encoding."""
    body = bytearray(wire.encode(data.draw(messages))[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(9, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = wire.decode(sealed(bytes(body)))
    except WireError:
        return
    assert wire.encode(got) == sealed(bytes(body))


def head_with(**changed: Any) -> bytes:
    names = ["kind", "algorithm", "run", "digest", "weights", "round", "client", "weight", "values"]
    fields = dict(zip(names, [0, "ferret", RUN, DIGEST, WEIGHTS, 3, 2, 1.0, {}], strict=True))
    return msgpack.packb(list({**fields, **changed}.values()))  # type: ignore[no-any-return]


def extension(code: int, *lengths: int, dtype: bytes = b"") -> Any:
    return msgpack.ExtType(code, dtype + b"".join(map(msgpack.packb, lengths)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": 6}, "kind must be one of 0 .. 5, got 6"),
        ({"kind": True}, "shortest form"),
        ({"algorithm": ""}, "algorithm must be 1 to 64 printable characters of ASCII, got ''"),
        ({"algorithm": "a\n"}, r"printable characters of ASCII, got 'a\\n'"),
        ({"digest": b"short"}, "digest must be 8 bytes"),
        ({"digest": "textual "}, "digest must be 8 bytes"),
        ({"run": 8}, "run must be 8 bytes, got 8"),
        ({"weights": bytes(9)}, "weights must be 8 bytes"),
        ({"round": -1}, r"round must be an integer in \[0, 2\^32\), got -1"),
        ({"round": 1.0}, "round must be an integer"),
        ({"client": 2**32}, "client must be an integer"),
        ({"weight": float("nan")}, "weight must be a finite float > 0, got nan"),
        ({"weight": -1.0}, "weight must be a finite float > 0, got -1.0"),
        ({"weight": 1}, "weight must be a finite float > 0, got 1"),
        ({"values": []}, "values must be a map"),
        ({"values": {b"x": 1}}, "a value's name must be 1 to 64 printable characters of ASCII, got b'x'"),
        ({"values": {"x": None}}, "x must be an int, .*, got NoneType"),
        ({"values": {"x": True}}, "x must be an int, .*, got bool"),
        ({"values": {"x": [1]}}, "x must be an int, .*, got list"),
        ({"values": {"x": float("inf")}}, "x must be finite, got inf"),
        ({"values": {"x": extension(9)}}, "got type 9"),
        ({"values": {"x": extension(1, 2**40, dtype=b"\0")}}, "x must fit the message, 4398046511104 bytes"),
        ({"values": {"x": extension(1, 2**63, 2, dtype=b"\0")}}, "x must have a sane shape"),
        ({"values": {"x": extension(1, 0, *[2**40] * 3, dtype=b"\0")}}, "x must have a sane shape"),
        ({"values": {"x": extension(1, dtype=b"\x63")}}, "x must have one of the wire's dtypes"),
        ({"values": {"x": extension(1, dtype=b"\0\xcc\1")}}, "x must have lengths as msgpack's shortest"),
        ({"values": {"x": extension(1, dtype=b"\0\xcd\1")}}, "x must have lengths as msgpack's shortest"),
        ({"values": {"x": extension(1, dtype=b"\0\x91\1")}}, "x must have lengths as msgpack's shortest"),
        ({"values": {"x": extension(2, -1)}}, "x must have lengths as msgpack's shortest integers"),
        ({"values": {"x": extension(2, dtype=b"\xdd\xff\xff\xff\xff")}}, "x must have lengths as"),
        ({"values": {"x": extension(2, 2**62)}}, "x must fit the message"),
        ({"values": {"x": extension(2, 0, 0)}}, "x must have one length, got 2"),
        ({"values": {"x": extension(3, 0, 1)}}, "x must fit the message, 1 bytes are announced and 0 left"),
    ],
)
def test_wrong_fields_under_a_right_checksum_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.decode(framed(head_with(**changed)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at least 13 bytes, got 0"),
        (sealed(b"JUNK\3\0\0\0\0"), "must begin with b'FRET', got b'JUNK'"),
        (sealed(b"FRET\1\0\0\0\0"), "format version must be 5, got 1"),
        (sealed(b"FRET\5\xff\xff\xff\xff"), "head must have at most 0 bytes, got 4294967295"),
        (framed(b"\xdd\xff\xff\xff\xff"), "head must be msgpack"),
        (framed(b"\x91" * 2000), "head must be msgpack"),
        (framed(b"\x99" + b"\xdd\0\1\0\0" * 100), "head must be msgpack"),
        (framed(b"\x80"), "head must be a list of 9 fields"),
        (framed(head_with()[:-1] + b"\xde\0\0"), "head must be in its shortest form"),
        (framed(head_with()[:-1] + b"\x82\xa1x\1\xa1x\1"), "without repeated names"),
    ],
)
def test_wrong_frames_are_named(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.decode(data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"digest": b"short"}, "digest must be 8 bytes, got b'short'"),
        (
            {"kind": "reply"},
            "kind must be one of update, broadcast, dissent, record, request, answer, got 'reply'",
        ),
        ({"algorithm": "x" * 65}, "algorithm must be 1 to 64 printable characters"),
        ({"algorithm": "é"}, "algorithm must be 1 to 64 printable characters"),
        ({"round": -1}, r"round must be an integer in \[0, 2\^32\), got -1"),
        ({"client": 2**32}, "client must be an integer"),
        ({"weight": 0.0}, "weight must be a finite float > 0"),
        ({"values": {"x": 2**64}}, "a value does not fit its field"),
        ({"values": {"x": "\ud800"}}, "a value does not fit its field"),
        ({"values": {"x": float("nan")}}, "x must be finite, got nan"),
        ({"values": {"x": True}}, "x must be an int, .*, got bool"),
        ({"values": {"x": [b""] * 65537}}, "x must have at most 65536 items, got 65537"),
        ({"values": {"x": "y" * 2**20}}, "head must have at most 1048576 bytes"),
        (
            {"values": {"x": np.array([1, np.nan], np.float32)}},
            "x must be finite, 1 elements are not, .* at 1",
        ),
        ({"values": {"x": np.array([0x7F80], "<u2").view(BFLOAT16)}}, "x must be finite"),
        ({"values": {"x": np.array([1j])}}, "x must have one of the wire's dtypes, got complex128"),
        ({"values": {"x": np.array(["y"], object)}}, "x must have one of the wire's dtypes, got object"),
    ],
)
def test_encode_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.encode(update(**changed))


def test_value_and_array_say_what_is_missing() -> None:
    message = update(client=4)
    assert message.value("seed", int) == 2**63 + 2
    assert message.array("gammas", "<f4", (5,)).tolist() == [-2, -1, 0, 1, 2]
    with pytest.raises(WireError, match="ferret: client 4's update must have step as float, got none"):
        message.value("step", float)
    with pytest.raises(WireError, match=r"gammas as float32 of shape \[6\], got float32 of shape \[5\]"):
        message.array("gammas", "<f4", (6,))
    with pytest.raises(WireError, match="ferret: broadcast must have updates as str, got list"):
        broadcast().value("updates", str)
