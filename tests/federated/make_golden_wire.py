"""Writes tests/federated/golden_wire.txt: one round's messages of every algorithm, and a ledger's records.

    python tests/federated/make_golden_wire.py > tests/federated/golden_wire.txt

It changes only with the version of the format (docs/wire.md), or with an algorithm's messages.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gallery
import numpy as np

from ferret_ext.federated import journal, wire
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.ledger import Ledger, read
from ferret_ext.federated.metrics import Outcome, Rejection
from ferret_ext.federated.secure import messages
from ferret_ext.federated.secure.assembly import MaskedSum
from ferret_ext.federated.wire import Message

ORDER = [
    *("request-keys", "answer-keys", "request-update", "request-pairs", "answer-pairs", "request-shares"),
    "answer-shares",
]
GENESIS = Genesis(bytes(range(32)), '{"algorithm": "ferret"}')


def lines() -> Iterator[str]:
    """`algorithm message bytes`, the bytes in hexadecimal."""
    for name in gallery.ALGORITHMS:
        server = gallery.serve(name)
        opening = server.broadcasts[0]
        sent = gallery.play(server)
        for what, data in (("opening", opening), ("update", sent[0]), ("broadcast", server.broadcasts[1])):
            yield f"{name} {what} {data.hex()}"
    for what, data in exchanged().items():
        yield f"ferret-secure {what} {data.hex()}"
    yield f"ferret dissent {dissent().hex()}"
    for what, data in zip(("first-record", "record"), records(), strict=True):
        yield f"ferret {what} {data.hex()}"


def exchanged() -> dict[str, bytes]:
    """What else crosses in a masked round in which client 2 sends no update."""
    said: dict[str, bytes] = {}
    round_ = gallery.masked_round(1, 40)
    circle = copy.deepcopy(round_.circle)

    def keep(stage: str, client: int, data: bytes) -> bytes:
        if stage == "request":
            stage = wire.decode(data).value("stage", str)
            said.setdefault(f"request-{stage}", data)
        elif client == 1:
            said[f"answer-{stage}"] = data
        return data

    circle.change = keep
    said["request-update"] = round_.invitation
    for client in circle.clients:
        about = Message("ferret-secure", "request", bytes(8), 1, run=gallery.RUN)
        request = messages.write("request", "keys", about, round_.session, 0)
        circle.ask(1, {client: request}, 1, 1)
    server = gallery.serve("ferret-secure")
    sent = [wire.decode(gallery.update(server, client)) for client in (0, 1)]
    MaskedSum.settle(round_, Updates(sent, [b"", b""], [1.0, 1.0]), circle.talk())
    return {what: said[what] for what in sorted(said, key=ORDER.index)}


def dissent() -> bytes:
    """What a client sends whose weights are not the server's."""
    server = gallery.serve("ferret")
    digests = np.arange(8 * len(server.replica.params), dtype=np.uint8)
    fields = ("ferret", "dissent", server.replica.digest, 1, 2)
    return wire.encode(Message(*fields, values={"digests": digests}, run=gallery.RUN))


def records() -> list[bytes]:
    """Of a ledger of one round, in which client 3 was rejected."""
    server = gallery.serve("ferret")
    with tempfile.TemporaryDirectory() as folder:
        kept = Ledger.create(Path(folder) / "ledger")
        kept.append(journal.opening_record(server, GENESIS))
        gallery.play(server)
        rejected = [Rejection(3, "client 3 has no part in round 1")]
        outcome = Outcome(1, [0, 1, 2, 4], [4], rejected, [0, 1, 2], [bytes(32)] * 3, 0.5, 813, 300)
        kept.append(journal.record_of(server, outcome))
        kept.close()
        return [wire.encode(record) for record in read(Path(folder) / "ledger")]


if __name__ == "__main__":
    print(*lines(), sep="\n")
