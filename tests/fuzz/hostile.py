"""Messages that no client would send, made from honest ones by a script: a short string of bytes.

Every byte string is a script: a coverage-guided engine, a random one and the file of a former failure go
the same way. What is changed is sealed again with a right length and checksum: nothing else gets far.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack  # type: ignore[import-untyped]
import numpy as np

from ferret_ext.federated import wire

T = TypeVar("T")
FIELDS = ("kind", "algorithm", "run", "digest", "weights", "round", "client", "weight")
NAMES = (  # of all messages' and records' values, and some that none may have
    *(
        "0",
        "1",
        "4",
        "contract",
        "seed",
        "next_seed",
        "gammas",
        "step",
        "updates",
        "factors",
        "pool",
        "counts",
    ),
    *("sums", "slopes", "votes", "candidates", "magnitudes", "visits", "digests", "broadcast", "previous"),
    *("base", "config", "clients", "left_out", "accepted", "rejected", "reasons", "bytes_up", "bytes_down"),
    *("stage", "session", "threshold", "keys", "key", "masked", "sealed", "dropped", "survivors", "shares"),
    *("train_loss", "x", "", "\x1b[2J\n", "é", "y" * 65),
)
NUMBERS: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        127,
        128,
        255,
        2**16,
        2**31,
        2**32 - 1,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64 - 1,
        -(2**63),
    ),
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 5e-324, 1e38, 3.4e38, 3.5e38, 1e154, 1e308, 1.7e308, -1.7e308),
    *(float("nan"), float("inf"), -float("inf"), True, None),
)
TEXTS: tuple[Any, ...] = ("", "a", "{}", "\x1b]0;\x07\n", "\x00" * 9, "é" * 70, "[" * 5000, "y" * 70000)
BYTES: tuple[Any, ...] = (b"", b"\xff", b"\xc3", bytes(8), bytes(9), bytes(32), b"FRET\x05", b"\x91" * 2000)
EXTENSIONS = (
    msgpack.ExtType(1, b""),
    msgpack.ExtType(1, b"\x00\xcf" + bytes(7) + b"\x05"),
    msgpack.ExtType(1, b"\x00" + msgpack.packb(2**47)),
    msgpack.ExtType(1, b"\x00\x00" + msgpack.packb(2**47) * 7),
    msgpack.ExtType(1, b"\x00" + msgpack.packb(2**64 - 1) * 8),
    msgpack.ExtType(1, b"\x00" + b"\x01" * 4000),
    msgpack.ExtType(1, b"\x63\x00"),
    msgpack.ExtType(2, msgpack.packb(2**62)),
    msgpack.ExtType(2, b"\xff"),
    msgpack.ExtType(3, bytes(20000)),
    msgpack.ExtType(3, msgpack.packb(2**63) * 2),
    msgpack.ExtType(3, b"\xdd\xff\xff\xff\xff"),
    msgpack.ExtType(3, b"\x81\x91\xc0"),
    msgpack.ExtType(9, b"?"),
    msgpack.Timestamp(2**40, 5),
)
ELEMENTS = (0, 1, -1, 2, 3.4028234e38, -3.4028234e38, 1e-45, 1e30, 65504, 255, 2**32 - 1, 2**31, float("nan"))


class Script:
    """Choices, one after the other; zeros where the bytes are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def below(self, limit: int) -> int:
        """A number in [0, limit)."""
        size = 1 if limit <= 256 else 4
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % limit

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]


# ---- messages without their rules ----


def loosen(data: bytes) -> dict[str, Any]:
    """An honest message as something that can be changed at will: its fields, and `values`."""
    message = wire.decode(data)
    fields = {name: getattr(message, name) for name in FIELDS}
    return {**fields, "kind": wire.KINDS.index(message.kind), "values": dict(message.values)}


def forge(fields: dict[str, Any]) -> bytes:
    """The bytes of a message of these fields, whatever they are."""
    payloads: list[bytes] = []
    values = fields["values"]
    if isinstance(values, dict):
        values = {name: _describe(value, payloads) for name, value in values.items()}
    try:
        head = msgpack.packb([*(fields[name] for name in FIELDS), values])
    except (ValueError, OverflowError, TypeError):
        head = msgpack.packb(None)
    return sealed(struct.pack("<4sBI", b"FRET", wire.VERSION, len(head)) + head + b"".join(payloads))


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def _describe(value: Any, payloads: list[bytes]) -> Any:
    if isinstance(value, np.ndarray):
        payloads.append(value.tobytes())
        return msgpack.ExtType(1, bytes([wire.DTYPES.index(value.dtype)]) + _lengths(*value.shape))
    if isinstance(value, bytes):
        payloads.append(value)
        return msgpack.ExtType(2, _lengths(len(value)))
    if isinstance(value, list) and _is_bytes(value):
        payloads += value
        return msgpack.ExtType(3, _lengths(*map(len, value)))
    return value


def _lengths(*numbers: int) -> bytes:
    return b"".join(map(msgpack.packb, numbers))


# ---- changes ----


def mutate(honest: bytes, script: Script, depth: int = 0) -> bytes:
    """The honest message, changed as the script says."""
    fields = loosen(honest)
    for _ in range(script.pick((1, 1, 2, 3))):
        script.pick(CHANGES)(fields, script, depth)
    how = script.below(16)
    if how == 2:
        fields["values"] = anything(script)
    data = forge(fields)
    if how == 0:
        return _torn(data, script)
    return _scribbled(data, script) if how == 1 else data


def _torn(data: bytes, script: Script) -> bytes:
    cut = script.below(len(data) + 1)
    return sealed(data[:cut]) if script.below(2) else data[:cut]


def _scribbled(data: bytes, script: Script) -> bytes:
    body = bytearray(data[:-4])
    for _ in range(1 + script.below(4)):
        body[script.below(len(body))] = script.below(256)
    return sealed(bytes(body))


def anything(script: Script) -> Any:
    """A value of any type and size."""
    kind = script.below(8)
    if kind == 0:
        return script.pick(TEXTS)
    if kind == 1:
        return script.pick(BYTES)
    if kind == 2:
        return script.pick(EXTENSIONS)
    if kind == 3:
        return [script.pick(BYTES) for _ in range(script.below(5))]
    if kind == 4:
        return script.pick(([[[]]], {"a": {"b": []}}, [1], [None] * 9, {}))
    if kind == 5:
        return array(script)
    return script.pick(NUMBERS)


def array(script: Script) -> wire.Array:
    dtype = script.pick(wire.DTYPES)
    shape = tuple(
        script.pick((0, 1, 2, 3, 4, 6, 24, 40, 63, 96)) for _ in range(script.pick((1, 1, 2, 0, 3)))
    )
    made = np.zeros(shape, dtype)
    if made.size and dtype != wire.BFLOAT16:
        _fill(made.reshape(-1), script)
    return made


def _fill(flat: wire.Array, script: Script) -> None:
    with np.errstate(all="ignore"):
        element = np.array([script.pick(ELEMENTS)], np.float64).astype(flat.dtype)[0]
    if script.below(2):
        flat[:] = element
    else:
        flat[script.below(len(flat))] = element


def _change_field(fields: dict[str, Any], script: Script, depth: int) -> None:
    fields[script.pick(FIELDS)] = anything(script)


def _change_value(fields: dict[str, Any], script: Script, depth: int) -> None:
    values = fields["values"]
    if values:
        values[script.pick(sorted(values))] = anything(script)


def _add_value(fields: dict[str, Any], script: Script, depth: int) -> None:
    fields["values"][script.pick(NAMES)] = anything(script)


def _drop_value(fields: dict[str, Any], script: Script, depth: int) -> None:
    if fields["values"]:
        del fields["values"][script.pick(sorted(fields["values"]))]


def _change_elements(fields: dict[str, Any], script: Script, depth: int) -> None:
    """Elements of an array that keeps its dtype and shape, so that it gets past the checks of both."""
    values = fields["values"]
    arrays = sorted(name for name, value in values.items() if isinstance(value, np.ndarray) and value.size)
    if not arrays:
        return
    name = script.pick(arrays)
    values[name] = values[name].copy()
    plain = values[name].dtype != wire.BFLOAT16
    flat = values[name].reshape(-1) if plain else values[name].view("<u2").reshape(-1)
    _fill(flat, script)


def _change_number(fields: dict[str, Any], script: Script, depth: int) -> None:
    values = fields["values"]
    numbers = sorted(name for name, value in values.items() if isinstance(value, (int, float)))
    if numbers:
        name = script.pick(numbers)
        values[name] = type(values[name])(script.pick([n for n in NUMBERS if type(n) is type(values[name])]))


def _change_items(fields: dict[str, Any], script: Script, depth: int) -> None:
    """Messages inside of the message, or other bytes: changed, repeated, left out."""
    values = fields["values"]
    lists = sorted(name for name, value in values.items() if _is_bytes(value))
    if not lists or depth > 1:
        return
    name = script.pick(lists)
    items = values[name] if isinstance(values[name], list) else [values[name]]
    how = script.below(4)
    if how == 0 and items:
        place = script.below(len(items))
        items[place] = _changed_bytes(items[place], script, depth)
    elif how == 1:
        items = items * script.pick((0, 2, 3, 100))
    elif how == 2:
        items = items[1:]
    elif items:
        items = [*items, items[0]]
    values[name] = items if isinstance(values[name], list) else b"".join(items)


def _is_bytes(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, bytes) for item in items)


def _changed_bytes(data: bytes, script: Script, depth: int) -> bytes:
    try:
        return mutate(data, script, depth + 1)
    except wire.WireError:
        return data[script.below(len(data) + 1) :] + script.pick(BYTES)


def _nothing(fields: dict[str, Any], script: Script, depth: int) -> None: ...


CHANGES: tuple[Callable[[dict[str, Any], Script, int], None], ...] = (
    _nothing,
    *(_change_field, _change_value, _add_value, _drop_value),
    *(_change_elements, _change_elements, _change_number, _change_items, _change_items),
)
