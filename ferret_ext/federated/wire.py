"""What crosses between clients and server: little-endian messages, checked to the last byte.

An *update* is one client's seed and coordinates. A *broadcast* is a round's updates, verbatim, with the step
that everybody applies them with. Round 0's broadcast is empty: it opens the run.

    update     "FRET" u8 version  u8 1  8s plan  u32 contract  u32 round  u32 client  u64 seed  f64 weight
               u32 count  f32[count] coordinates  u32 crc32
    broadcast  "FRET" u8 version  u8 2  8s plan  u32 contract  u32 round  f64 step
               u32 count  update[count]  u32 crc32

`plan` is the first 8 bytes of the block plan's sha256, `contract` the stream contract's tag with the basis
kind in its low byte, `crc32` that of all bytes before it. Coordinates are float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"FRET"
VERSION = 1
CONTRACT = 0x00010000  # version 1 of the stream contract; the low byte is the basis kind
BASES = {"rademacher": 1, "uniform": 2, "gaussian": 3}

_UPDATE, _BROADCAST = 1, 2
_PREFIX = struct.Struct("<4sBB8sII")  # magic, version, kind, plan, contract, round
_UPDATE_REST = struct.Struct("<IQdI")  # client, seed, weight, count
_BROADCAST_REST = struct.Struct("<dI")  # step, count
_CRC = struct.Struct("<I")

Coordinates = npt.NDArray[np.float32]


class WireError(ValueError):
    """Bytes that are not a message of this format, or values that do not fit into one."""


@dataclass(frozen=True, eq=False)
class Update:
    """One client's contribution to a round: delta~ = V(seed) gammas, counted with `weight`."""

    plan: bytes
    basis: str
    round: int
    client: int
    seed: int
    weight: float
    gammas: Coordinates = field(repr=False)  # [K]


@dataclass(frozen=True, eq=False)
class Broadcast:
    """A round's updates: w -= step * sum_i weight_i / (sum_j weight_j) * V(seed_i) gammas_i."""

    plan: bytes
    basis: str
    round: int
    step: float
    updates: tuple[Update, ...]


def encode_update(update: Update) -> bytes:
    """The update as bytes; WireError if a value does not fit."""
    gammas = np.ascontiguousarray(update.gammas, dtype="<f4")
    _check(gammas.ndim == 1, f"gammas must have one dimension, got shape {list(gammas.shape)}")
    _check_update(update.weight, gammas)
    head = _pack_prefix(_UPDATE, update.plan, update.basis, update.round)
    rest = _pack(_UPDATE_REST, update.client, update.seed % 2**64, update.weight, gammas.size)
    return _seal(head + rest + gammas.tobytes())


def decode_update(message: bytes) -> Update:
    """The update in exactly these bytes; WireError for anything else."""
    update, end = _read_update(message, 0)
    _check(end == len(message), f"update must end after {end} bytes, got {len(message)}")
    return update


def encode_broadcast(plan: bytes, basis: str, round_: int, step: float, updates: Sequence[bytes]) -> bytes:
    """The clients' messages, as they came, in one."""
    _check(math.isfinite(step), f"step must be finite, got {step}")
    head = _pack_prefix(_BROADCAST, plan, basis, round_)
    return _seal(head + _pack(_BROADCAST_REST, step, len(updates)) + b"".join(updates))


def decode_broadcast(message: bytes) -> Broadcast:
    """The broadcast in exactly these bytes, all updates of its plan, basis and round; WireError otherwise."""
    plan, basis, round_, at = _unpack_prefix(message, 0, _BROADCAST)
    step, count = _unpack(_BROADCAST_REST, message, at)
    _check(math.isfinite(step), f"step must be finite, got {step}")
    at += _BROADCAST_REST.size
    updates = []
    for _ in range(count):
        update, at = _read_update(message, at)
        _check(
            (update.plan, update.basis, update.round) == (plan, basis, round_),
            f"client {update.client}'s update must be of the broadcast's plan, basis and round",
        )
        updates.append(update)
    end = _check_seal(message, 0, at)
    _check(end == len(message), f"broadcast must end after {end} bytes, got {len(message)}")
    return Broadcast(plan, basis, round_, step, tuple(updates))


def _read_update(message: bytes, start: int) -> tuple[Update, int]:
    """The update that begins at `start`, and where it ends."""
    plan, basis, round_, at = _unpack_prefix(message, start, _UPDATE)
    client, seed, weight, count = _unpack(_UPDATE_REST, message, at)
    at += _UPDATE_REST.size
    end = at + 4 * count
    after = _check_seal(message, start, end)
    gammas = np.frombuffer(message[at:end], dtype="<f4").astype(np.float32)
    _check_update(weight, gammas)
    return Update(plan, basis, round_, client, seed, weight, gammas), after


def _check_update(weight: float, gammas: Coordinates) -> None:
    _check(math.isfinite(weight) and weight > 0, f"weight must be finite and > 0, got {weight}")
    bad = np.flatnonzero(~np.isfinite(gammas))
    _check(bad.size == 0, f"gammas must be finite, {bad.size} are not, the first at {bad[:1].tolist()}")


def _pack_prefix(kind: int, plan: bytes, basis: str, round_: int) -> bytes:
    _check(len(plan) == 8, f"plan must be a digest's first 8 bytes, got {len(plan)}")
    _check(basis in BASES, f"basis must be one of {', '.join(BASES)}, got {basis!r}")
    return _pack(_PREFIX, MAGIC, VERSION, kind, plan, CONTRACT | BASES[basis], round_)


def _unpack_prefix(message: bytes, at: int, kind: int) -> tuple[bytes, str, int, int]:
    magic, version, got, plan, contract, round_ = _unpack(_PREFIX, message, at)
    _check(magic == MAGIC, f"message must begin with {MAGIC!r}, got {magic!r}")
    _check(version == VERSION, f"format version must be {VERSION}, got {version}")
    _check(got == kind, f"message kind must be {kind}, got {got}")
    basis = next((name for name, code in BASES.items() if CONTRACT | code == contract), None)
    if basis is None:
        raise WireError(f"wire: contract must be version 1 of the streams, got tag {contract:#010x}")
    return plan, basis, round_, at + _PREFIX.size


def _pack(layout: struct.Struct, *values: object) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise WireError(f"wire: a value does not fit its field: {error}") from None


def _unpack(layout: struct.Struct, message: bytes, at: int) -> tuple[Any, ...]:
    _check(at + layout.size <= len(message), f"message of {len(message)} bytes is cut short")
    return layout.unpack_from(message, at)


def _seal(body: bytes) -> bytes:
    return body + _CRC.pack(zlib.crc32(body))


def _check_seal(message: bytes, start: int, end: int) -> int:
    """Where the message that begins at `start` and has its checksum at `end` is over."""
    (expected,) = _unpack(_CRC, message, end)
    got = zlib.crc32(message[start:end])
    _check(got == expected, f"checksum must be {expected:#010x}, got {got:#010x}")
    return end + _CRC.size


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise WireError(f"wire: {text}")
