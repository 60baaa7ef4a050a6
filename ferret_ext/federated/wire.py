"""What crosses between clients and server: one kind of message for all algorithms, checked to the last byte.

An *update* goes from a client to the server, a *broadcast* from the server to the clients. A *dissent* goes
from a client whose weights are not the server's, instead of an update. A *record* goes nowhere: it is an
entry of the ledger. A *request* goes from the server to a client, and its *answer* back, where a round takes
more than updates. All say which run, algorithm, model or plan, weights and round they belong to, and carry
named values; docs/wire.md lists them by algorithm.

    "FRET"  u8 version  u32 head length  head  payloads  u32 crc32          (little-endian)
    head    msgpack [kind, algorithm, run, digest, weights, round, client, weight, {name: value}], in its
            shortest form

Integers, floats and text stand in the head. Arrays, bytes and lists of bytes stand behind it as payloads, one
after the other without gaps, and in the head as extension types that say how long they are, in msgpack's
shortest integers:

    1  array          u8 dtype (its place in DTYPES), each dimension; C order
    2  bytes          length
    3  list of bytes  length of each

`crc32` is that of all bytes before it. Every message has one encoding, and equal messages have equal bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

MAGIC = b"FRET"
VERSION = 5
DIGEST_BYTES = 8
NO_DIGEST = bytes(DIGEST_BYTES)
MAX_HEAD = 1 << 20  # bytes
HEAD_FIELDS = 9
MAX_NAME = 64  # characters of an algorithm's or a value's name
MAX_ITEMS = 1 << 16  # of a list
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has no bfloat16: these are its bits, under a name

Kind = Literal["update", "broadcast", "dissent", "record", "request", "answer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OF_CLIENTS = ("update", "dissent", "answer")
DTYPES: tuple[np.dtype[Any], ...] = (
    *map(np.dtype, ("<f4", "<f2", "<f8")),
    BFLOAT16,
    *map(np.dtype, ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8")),
)

_ARRAY, _BYTES, _LIST = 1, 2, 3
_ONLY_NUMBERS = dict.fromkeys(
    ("max_str_len", "max_bin_len", "max_array_len", "max_map_len", "max_ext_len"), 0
)
_PREFIX = struct.Struct("<4sBI")  # magic, version, head length
_CRC = struct.Struct("<I")

Array = npt.NDArray[Any]
Value = int | float | str | bytes | Array | list[bytes]
T = TypeVar("T")


class WireError(ValueError):
    """Bytes that are not a message of this format, or values that do not fit into one."""


class NotFiniteError(WireError):
    """A NaN or an infinity among the values."""


@dataclass(frozen=True, eq=False)
class Message:
    """One message, from one client or from the server.

    digest: 8 bytes that name the parameters or the block plan that the values are about.
    algorithm: 1 to 64 printable characters of ASCII, like the names of values, so that logs can show them.
    client, weight: whose update it is and how much it counts; a broadcast leaves them as they are.
    run: 8 bytes that name the run.
    weights: 8 bytes that name the global model's weights: those that the sender of an update or a dissent
        holds, or that a broadcast leads to; zeros where nobody looks at them.
    values: whole numbers in [-2^63, 2^64), finite floats, text, bytes, lists of bytes, and arrays of the
        dtypes in DTYPES, whose floats are finite.
    """

    algorithm: str
    kind: Kind
    digest: bytes
    round: int
    client: int = 0
    weight: float = 1.0
    values: Mapping[str, Value] = field(default_factory=dict, repr=False)
    run: bytes = NO_DIGEST
    weights: bytes = NO_DIGEST

    @property
    def sender(self) -> str:
        """Whose message it is, in words."""
        return f"client {self.client}'s {self.kind}" if self.kind in OF_CLIENTS else self.kind

    def value(self, name: str, kind: type[T]) -> T:
        """The value called `name`; WireError if there is none, or one of another type."""
        found = self.values.get(name)
        if type(found) is not kind:
            raise self._unfit(name, kind.__name__, "none" if found is None else type(found).__name__)
        return found

    def array(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
        """The array called `name`; WireError if there is none, or one of another dtype or shape."""
        found = self.value(name, np.ndarray)
        if found.dtype != np.dtype(dtype) or found.shape != shape:
            expected = f"{np.dtype(dtype)} of shape {list(shape)}"
            raise self._unfit(name, expected, f"{found.dtype} of shape {list(found.shape)}")
        return found

    def seed(self, name: str) -> int:
        """The seed called `name`; WireError unless it is a whole number in [0, 2^64)."""
        found = self.value(name, int)
        if found < 0:
            raise self._unfit(name, "a whole number in [0, 2^64)", str(found))
        return found

    def only(self, *names: str, optional: Collection[str] = ()) -> None:
        """WireError unless the values have these names, with some or none of the optional ones beside them.

        What nobody reads must not be there: it would be relayed to everybody.
        """
        got = self.values.keys()
        if missing := [name for name in names if name not in got]:
            raise WireError(f"{self.algorithm}: {self.sender} must have {missing[0]}, got none")
        if unknown := got - {*names, *optional}:
            expected = f"no values but {', '.join(names)}" if names else "no values"
            raise WireError(f"{self.algorithm}: {self.sender} must have {expected}, got {min(unknown)}")

    def _unfit(self, name: str, expected: str, got: str) -> WireError:
        return WireError(f"{self.algorithm}: {self.sender} must have {name} as {expected}, got {got}")


def encode(message: Message) -> bytes:
    """The message as bytes; WireError if a value does not fit."""
    _check_message(message)
    payloads: list[bytes | memoryview] = []
    values = {name: _write(name, value, payloads) for name, value in message.values.items()}
    head = _pack(message, values)
    _check(len(head) <= MAX_HEAD, f"head must have at most {MAX_HEAD} bytes, got {len(head)}")
    parts = [_PREFIX.pack(MAGIC, VERSION, len(head)), head, *payloads]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([*parts, _CRC.pack(crc)])


def array_bytes(itemsize: int, shape: Sequence[int]) -> int:
    """How many bytes a message has for an array of such elements, but for its name."""
    return len(msgpack.packb(_array_head(0, shape))) + math.prod(shape) * itemsize


def check(message: Message) -> None:
    """Raises WireError unless `encode` would take the message."""
    _check_message(message)
    for name, value in message.values.items():
        _write(name, value, [])


def decode(data: bytes, copy: bool = True) -> Message:
    """The message in exactly these bytes; WireError for anything else.

    Its arrays are copies of their own, or else views of the bytes, read-only and not aligned.
    """
    view = memoryview(data)
    head, at = _read_head(view)
    reader = _Reader(view[: len(view) - _CRC.size], at, copy)
    kind, algorithm, run, digest, weights, round_, client, weight, described = head
    _check(isinstance(described, dict), "values must be a map")
    _check(
        isinstance(kind, int) and kind in range(len(KINDS)),
        f"kind must be one of 0 .. {len(KINDS) - 1}, got {kind!r:.80}",
    )
    for name in described:  # before errors about its value tell it
        _check_name("a value's name", name)
    values = {name: _read(name, value, reader) for name, value in described.items()}
    left = len(reader.view) - reader.at
    _check(left == 0, f"message must end after its payloads, got {left} more bytes")
    message = Message(algorithm, KINDS[kind], digest, round_, client, weight, values, run, weights)
    _check_message(message)
    canonical = _pack(message, described) == view[_PREFIX.size : at]
    _check(canonical, "head must be in its shortest form, without repeated names")
    return message


class _Reader:
    """Hands out the payloads one after the other."""

    def __init__(self, view: memoryview, at: int, copy: bool) -> None:
        self.view = view
        self.at = at
        self.copy = copy

    def take(self, name: str, size: int) -> memoryview:
        left = len(self.view) - self.at
        if size > left:  # there may be many: no text unless it is wanted
            raise WireError(f"wire: {name} must fit the message, {size} bytes are announced and {left} left")
        self.at += size
        return self.view[self.at - size : self.at]


def _pack(message: Message, values: Mapping[str, object]) -> bytes:
    kind = KINDS.index(message.kind)
    whose = [kind, message.algorithm, message.run, message.digest, message.weights]
    try:
        packed: bytes = msgpack.packb([*whose, message.round, message.client, message.weight, dict(values)])
    except (ValueError, OverflowError) as error:  # integers of more than 64 bits, text that is no Unicode
        raise WireError(f"wire: a value does not fit its field: {error}") from None
    return packed


def _read_head(view: memoryview) -> tuple[list[Any], int]:
    """The head's fields, and where the payloads begin, once prefix and checksum are right."""
    shortest = _PREFIX.size + _CRC.size
    _check(len(view) >= shortest, f"message must have at least {shortest} bytes, got {len(view)}")
    magic, version, size = _PREFIX.unpack_from(view)
    _check(magic == MAGIC, f"message must begin with {MAGIC!r}, got {magic!r}")
    _check(version == VERSION, f"format version must be {VERSION}, got {version}")
    room = min(MAX_HEAD, len(view) - shortest)
    _check(size <= room, f"head must have at most {room} bytes, got {size}; the message may be cut short")
    (expected,), got = _CRC.unpack(view[-_CRC.size :]), zlib.crc32(view[: -_CRC.size])
    _check(got == expected, f"checksum must be {expected:#010x}, got {got:#010x}")
    at = _PREFIX.size + size
    try:  # the only list is the head itself, so no other length is believed
        head = msgpack.unpackb(view[_PREFIX.size : at], max_array_len=HEAD_FIELDS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"wire: head must be msgpack: {type(error).__name__} {error}") from None
    _check(
        isinstance(head, list) and len(head) == HEAD_FIELDS, f"head must be a list of {HEAD_FIELDS} fields"
    )
    return head, at


def _write(name: str, value: object, payloads: list[bytes | memoryview]) -> object:
    """What stands in the head for a value; appends its payload, if it has one."""
    if isinstance(value, np.ndarray):
        return _write_array(name, value, payloads)
    if isinstance(value, bytes):
        payloads.append(value)
        return msgpack.ExtType(_BYTES, _lengths([len(value)]))
    if isinstance(value, list) and all(isinstance(item, bytes) for item in value):
        _check(len(value) <= MAX_ITEMS, f"{name} must have at most {MAX_ITEMS} items, got {len(value)}")
        payloads += value
        return msgpack.ExtType(_LIST, _lengths(map(len, value)))
    _check_plain(name, value)
    return value


def _write_array(name: str, array: Array, payloads: list[bytes | memoryview]) -> object:
    dtype = array.dtype.newbyteorder("<")
    _check(dtype in DTYPES, f"{name} must have one of the wire's dtypes, got {array.dtype}")
    _check_finite(name, array)
    payloads.append(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
    return _array_head(DTYPES.index(dtype), array.shape)


def _array_head(dtype: int, shape: Sequence[int]) -> object:
    return msgpack.ExtType(_ARRAY, bytes([dtype]) + _lengths(shape))


def _read(name: str, value: object, reader: _Reader) -> Value:
    if not isinstance(value, msgpack.ExtType):
        _check_plain(name, value)
        return value  # type: ignore[return-value]
    if value.code == _ARRAY:
        return _read_array(name, value.data, reader)
    lengths = _read_lengths(name, value.data)
    if value.code == _BYTES:
        _check(len(lengths) == 1, f"{name} must have one length, got {len(lengths)}")
        return bytes(reader.take(name, lengths[0]))
    _check(value.code == _LIST, f"{name} must be an array, bytes or a list of bytes, got type {value.code}")
    return [bytes(reader.take(name, length)) for length in lengths]


def _read_array(name: str, data: bytes, reader: _Reader) -> Array:
    _check(data[:1] != b"" and data[0] < len(DTYPES), f"{name} must have one of the wire's dtypes")
    dtype, shape = DTYPES[data[0]], _read_lengths(name, data[1:])
    sane = len(shape) <= 8 and max(shape, default=0) < 2**48
    _check(sane, f"{name} must have a sane shape, got {shape!s:.80}")
    payload = reader.take(name, math.prod(shape) * dtype.itemsize)
    try:
        array: Array = np.frombuffer(payload, dtype).reshape(shape)
    except ValueError as error:  # empty, but too large in its other dimensions
        raise WireError(f"wire: {name} must have a sane shape, got {shape}: {error}") from None
    _check_finite(name, array)
    return array.copy() if reader.copy else array


def _lengths(numbers: Iterable[int]) -> bytes:
    return b"".join(map(msgpack.packb, numbers))


def _read_lengths(name: str, data: bytes) -> list[int]:
    _check(len(data) <= 9 * MAX_ITEMS, f"{name} must have at most {MAX_ITEMS} lengths")
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1), **_ONLY_NUMBERS)
    unpacker.feed(data)
    try:
        lengths = list(unpacker)
    except (ValueError, msgpack.UnpackException):
        lengths = []
    fit = all(type(length) is int and length >= 0 for length in lengths) and _lengths(lengths) == data
    _check(fit, f"{name} must have lengths as msgpack's shortest integers")
    _check(len(lengths) <= MAX_ITEMS, f"{name} must have at most {MAX_ITEMS} lengths, got {len(lengths)}")
    return lengths


def _check_message(message: Message) -> None:
    """The fields' types and ranges; those of the values are looked at one by one."""
    _check_name("algorithm", message.algorithm)
    _check(message.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {message.kind!r}")
    for name, digest in (("run", message.run), ("digest", message.digest), ("weights", message.weights)):
        right = isinstance(digest, bytes) and len(digest) == DIGEST_BYTES
        _check(right, f"{name} must be {DIGEST_BYTES} bytes, got {digest!r:.80}")
    for name, value in (("round", message.round), ("client", message.client)):
        fits = type(value) is int and 0 <= value < 2**32
        _check(fits, f"{name} must be an integer in [0, 2^32), got {value!r:.80}")
    weight = message.weight
    right = type(weight) is float and math.isfinite(weight) and weight > 0
    _check(right, f"weight must be a finite float > 0, got {weight!r:.80}")
    for name in message.values:
        _check_name("a value's name", name)


def _check_name(what: str, name: object) -> None:
    fits = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isascii() and name.isprintable()
    if not fits:  # there may be many: no text unless it is wanted
        raise WireError(
            f"wire: {what} must be 1 to {MAX_NAME} printable characters of ASCII, got {name!a:.80}"
        )


def _check_plain(name: str, value: object) -> None:
    plain = type(value) in (int, float, str)
    _check(
        plain, f"{name} must be an int, float, str, bytes, array or list of bytes, got {type(value).__name__}"
    )
    if isinstance(value, float) and not math.isfinite(value):
        raise NotFiniteError(f"wire: {name} must be finite, got {value}")


def _check_finite(name: str, array: Array) -> None:
    if array.dtype == BFLOAT16:
        bad = array["bfloat16"].reshape(-1) & 0x7F80 == 0x7F80  # the largest exponent
    elif array.dtype.kind == "f":
        bad = ~np.isfinite(array.reshape(-1))
    else:
        return
    if bad.any():
        first, count = int(bad.argmax()), int(bad.sum())
        raise NotFiniteError(f"wire: {name} must be finite, {count} elements are not, the first at {first}")


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise WireError(f"wire: {text}")
