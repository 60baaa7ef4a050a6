"""Messages that are not what their client should have sent, and a watcher that sees what becomes of them."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from federation import train

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.metrics import Rejection
from ferret_ext.federated.rounds import Deaf

MAKERS: dict[str, Callable[[], Any]] = {
    "ferret": lambda: Ferret(FerretConfig(K=40, allocation="norm", coordinates="float32"), 0.4, train),
    "ferret-shared-round": lambda: SharedFerret(
        FerretConfig(K=40, allocation="norm", coordinates="float32"), 0.4, train, seed=3
    ),
    "fedavg": lambda: FedAvg(0.4, train),
}


def changed(payload: bytes, values: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """The message with other values or fields."""
    message = wire.decode(payload)
    return wire.encode(dataclasses.replace(message, values={**message.values, **(values or {})}, **fields))


def first_array(payload: bytes) -> tuple[str, Any]:
    values = wire.decode(payload).values
    return next((name, value.copy()) for name, value in values.items() if isinstance(value, np.ndarray))


def multiplied(payload: bytes, factor: float) -> bytes:
    name, array = first_array(payload)
    return changed(payload, {name: (array * factor).astype(array.dtype)})


def with_number(payload: bytes, number: float) -> bytes:
    """The first array's last element is another; `encode` would refuse it, so the bytes are patched."""
    name, array = first_array(payload)
    marked = array.copy()
    marked[-1] = 12345.678
    data = changed(payload, {name: marked})
    place = data.index(struct.pack("<f", np.float32(12345.678)))
    patched = data[:place] + struct.pack("<f", number) + data[place + 4 : -4]
    return patched + struct.pack("<I", zlib.crc32(patched))


def seed_of(payload: bytes) -> int:
    return wire.decode(payload).value("seed", int)


class Listener(Deaf):
    def __init__(self) -> None:
        self.rejected: list[Rejection] = []

    def update_rejected(self, round_: int, rejection: Rejection) -> None:
        self.rejected.append(rejection)
