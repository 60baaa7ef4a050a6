"""Messages: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferret_ext.federated import wire
from ferret_ext.federated.wire import Update, WireError

PLAN = bytes(range(8))
UPDATE_OVERHEAD, BROADCAST_OVERHEAD = 50, 38

coordinates = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20)
updates = st.builds(
    Update,
    plan=st.binary(min_size=8, max_size=8),
    basis=st.sampled_from(sorted(wire.BASES)),
    round=st.integers(0, 2**32 - 1),
    client=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**64 - 1),
    weight=st.floats(min_value=1e-9, max_value=1e9),
    gammas=coordinates.map(lambda values: np.array(values, dtype=np.float32)),
)


def example(client: int = 0, round_: int = 3, plan: bytes = PLAN, basis: str = "rademacher") -> Update:
    return Update(plan, basis, round_, client, 2**63 + client, 1.0, np.arange(5, dtype=np.float32) - client)


def fields(update: Update) -> tuple[object, ...]:
    scalars = (update.plan, update.basis, update.round, update.client, update.seed, update.weight)
    return (*scalars, update.gammas.tobytes(), update.gammas.dtype)


@given(updates)
def test_update_round_trip(update: Update) -> None:
    message = wire.encode_update(update)
    assert fields(wire.decode_update(message)) == fields(update)
    assert len(message) == UPDATE_OVERHEAD + 4 * update.gammas.size


@given(st.lists(updates, max_size=4), st.floats(allow_nan=False, allow_infinity=False))
def test_broadcast_round_trip(sent: list[Update], step: float) -> None:
    sent = [Update(PLAN, "uniform", 9, u.client, u.seed, u.weight, u.gammas) for u in sent]
    messages = [wire.encode_update(update) for update in sent]
    message = wire.encode_broadcast(PLAN, "uniform", 9, step, messages)
    got = wire.decode_broadcast(message)
    assert (got.plan, got.basis, got.round, got.step) == (PLAN, "uniform", 9, step)
    assert [fields(update) for update in got.updates] == [fields(update) for update in sent]
    assert len(message) == BROADCAST_OVERHEAD + sum(map(len, messages))


def test_layout_is_as_documented() -> None:
    update = example(client=2)
    head = b"FRET" + bytes([1, 1]) + PLAN + struct.pack("<III", 0x00010001, 3, 2)
    body = head + struct.pack("<QdI", 2**63 + 2, 1.0, 5) + struct.pack("<5f", -2, -1, 0, 1, 2)
    assert wire.encode_update(update) == body + struct.pack("<I", zlib.crc32(body))
    opening = b"FRET" + bytes([1, 2]) + PLAN + struct.pack("<IIdI", 0x00010003, 0, 0.5, 0)
    message = wire.encode_broadcast(PLAN, "gaussian", 0, 0.5, [])
    assert message == opening + struct.pack("<I", zlib.crc32(opening))


def test_negative_seed_stands_for_itself_plus_2_to_the_64() -> None:
    update = Update(PLAN, "rademacher", 0, 0, -1, 1.0, np.zeros(1, np.float32))
    assert wire.decode_update(wire.encode_update(update)).seed == 2**64 - 1


def both() -> list[bytes]:
    sent = [wire.encode_update(example(client)) for client in (0, 1)]
    return [sent[0], wire.encode_broadcast(PLAN, "rademacher", 3, 0.3, sent)]


def decode(message: bytes, kind: int) -> object:
    return [wire.decode_update, wire.decode_broadcast][kind](message)


@pytest.mark.parametrize("kind", [0, 1])
def test_any_changed_byte_is_refused(kind: int) -> None:
    message = both()[kind]
    for at in range(len(message)):
        for flip in (1, 128, 255):
            damaged = bytearray(message)
            damaged[at] ^= flip
            with pytest.raises(WireError):
                decode(bytes(damaged), kind)


@pytest.mark.parametrize("kind", [0, 1])
def test_any_other_length_is_refused(kind: int) -> None:
    message = both()[kind]
    for length in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:length], kind)
    with pytest.raises(WireError, match="must end after"):
        decode(message + b"\0", kind)


@given(st.binary(max_size=200), st.sampled_from([0, 1]))
def test_noise_is_refused(noise: bytes, kind: int) -> None:
    with pytest.raises(WireError):
        decode(noise, kind)
    with pytest.raises(WireError):
        decode(both()[kind][:30] + noise, kind)


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"JUNK", "must begin with b'FRET', got b'JUNK'"),
        (4, b"\2", "format version must be 1, got 2"),
        (5, b"\2", "message kind must be 1, got 2"),
        (14, b"\1\0\2\0", "contract must be version 1 of the streams, got tag 0x00020001"),
        (14, b"\4\0\1\0", "got tag 0x00010004"),
        (34, struct.pack("<d", float("nan")), "weight must be finite and > 0, got nan"),
        (34, struct.pack("<d", -1.0), "weight must be finite and > 0, got -1.0"),
        (46, struct.pack("<f", float("inf")), r"gammas must be finite, 1 are not, the first at \[0\]"),
    ],
)
def test_wrong_values_under_a_right_checksum_are_named(at: int, value: bytes, message: str) -> None:
    body = bytearray(wire.encode_update(example())[:-4])
    body[at : at + len(value)] = value
    with pytest.raises(WireError, match=message):
        wire.decode_update(sealed(bytes(body)))


@pytest.mark.parametrize("other", [example(round_=4), example(plan=bytes(8)), example(basis="uniform")])
def test_broadcast_holds_updates_of_its_own_round_only(other: Update) -> None:
    message = wire.encode_broadcast(PLAN, "rademacher", 3, 0.3, [wire.encode_update(other)])
    with pytest.raises(WireError, match="client 0's update must be of the broadcast's plan, basis and round"):
        wire.decode_broadcast(message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plan": b"short"}, "plan must be a digest's first 8 bytes, got 5"),
        ({"basis": "cosine"}, "basis must be one of rademacher, uniform, gaussian, got 'cosine'"),
        ({"round": -1}, "a value does not fit its field"),
        ({"client": 2**32}, "a value does not fit its field"),
        ({"weight": 0.0}, "weight must be finite and > 0"),
        ({"gammas": np.array([1, np.nan], np.float32)}, r"1 are not, the first at \[1\]"),
        ({"gammas": np.zeros((2, 2), np.float32)}, r"got shape \[2, 2\]"),
    ],
)
def test_encode_update_refuses_what_does_not_fit(changed: dict[str, object], message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.encode_update(Update(**{**vars(example()), **changed}))  # type: ignore[arg-type]


def test_encode_broadcast_refuses_a_step_that_is_no_number() -> None:
    with pytest.raises(WireError, match="step must be finite, got nan"):
        wire.encode_broadcast(PLAN, "rademacher", 0, float("nan"), [])
