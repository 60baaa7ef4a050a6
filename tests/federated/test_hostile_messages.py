"""What fuzzing and thought found in messages that are well formed and mean harm (see tests/fuzz)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gallery
import msgpack
import numpy as np
import pytest
import torch
from gallery import CLIENTS, serve, update, values_of
from safetensors.torch import load_file, save_file
from test_wire import extension, framed, head_with

from ferret_ext.federated import journal, ledger, wire
from ferret_ext.federated.admission import Sent
from ferret_ext.federated.client import OptimizerStates
from ferret_ext.federated.config import LedgerConfig
from ferret_ext.federated.errors import LedgerError, QuorumError
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.ledger import Ledger
from ferret_ext.federated.metrics import Outcome
from ferret_ext.federated.server import Server
from ferret_ext.federated.snapshots import Optimizers, Snapshots
from ferret_ext.federated.wire import Message, NotFiniteError, WireError

HUGE = float(np.finfo(np.float32).max)


def play(server: Server[Any], *hostile: bytes) -> list[str]:
    """A round of these messages of clients 0, 1, .., and honest ones of the others; the reasons."""
    honest = [update(server, client) for client in range(len(hostile), CLIENTS)]
    sent = list(map(Sent, range(CLIENTS), [*hostile, *honest]))
    return [rejection.reason for rejection in server.apply(range(CLIENTS), sent)[1]]


def changed(server: Server[Any], client: int = 0, **values: wire.Value) -> bytes:
    return update(server, client, values={**values_of(server, client), **values})


def relayed(data: bytes, **values: wire.Value) -> bytes:
    """A broadcast with other values, and no digest of the weights that it leads to."""
    message = wire.decode(data)
    fields = (message.algorithm, message.kind, message.digest, message.round)
    return wire.encode(Message(*fields, values={**message.values, **values}, run=message.run))


def client_of(server: Server[Any]) -> Any:
    replica = server.algorithm.replicate(gallery.toy())
    server.algorithm.rebuild(replica, serve(server.algorithm.name).broadcasts[0])
    return replica


# ---- the frame ----


@pytest.mark.parametrize(
    "head",
    [
        head_with(kind="k" * 500_000),
        head_with(round="r" * 500_000),
        head_with(weight=b"w" * 500_000),
        head_with(algorithm="a" * 500_000),
        head_with(values={"n" * 500_000: extension(2, 2**60)}),
        head_with(values={"n" * 500_000: float("nan")}),
        head_with(values={"\x1b[2J": None}),
        head_with(values={"x": extension(1, *range(100_000), dtype=b"\0")}),
    ],
    ids=["kind", "round", "weight", "algorithm", "name", "name of nan", "escape", "shape"],
)
def test_errors_do_not_repeat_what_they_refuse_at_length(head: bytes) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(framed(head))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "head",
    [
        head_with(values={"x": extension(3, *[0] * 65_536)}),
        head_with(values={"x": extension(3, *[0] * 1_000_000)}),
        head_with(values={f"{i:x}": 0 for i in range(150_000)}),
        b"\x99" * 1_000_000,
        b"\x99" + b"\x99" + b"\x99\x90\x90\x90\x90\x90\x90\x90\x90\x90" * 90_000,
        b"\xdf\xff\xff\xff\xff" + b"\xa1x\x00" * 300_000,
        b"\xc6\xff\xff\xff\xff",
    ],
    ids=["list", "longer list", "values", "deep", "wide", "map", "bytes"],
)
def test_a_full_head_takes_bounded_memory_and_time(head: bytes) -> None:
    data = framed(head)
    start = time.process_time()
    tracemalloc.start()
    try:
        wire.decode(data)
    except WireError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 100 * 2**20
    assert time.process_time() - start < 5


def test_what_is_announced_is_not_allocated() -> None:
    tracemalloc.start()
    for shape in ([2**40], [2**47] * 8, [0, *[2**47] * 7]):
        with pytest.raises(WireError):
            wire.decode(framed(head_with(values={"x": extension(1, *shape, dtype=b"\0")})))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20


# ---- updates ----


@pytest.mark.parametrize("name", gallery.ALGORITHMS)
def test_an_update_has_no_values_that_nobody_reads(name: str) -> None:
    """They would be relayed to everybody, and two that are too large together overflowed a norm."""
    server = serve(name)
    (reason,) = play(server, changed(server, x=1.2e154, y=1.2e154))
    assert "client 0's update must have no values but" in reason or "expected 4 tensors, got 6" in reason
    if name not in gallery.AVERAGED:
        first = next(iter(values_of(server, 0)))
        values = {key: value for key, value in values_of(server, 0).items() if key != first}
        fresh = serve(name)
        (reason,) = play(fresh, update(fresh, 0, values={**values, "x": 1}))
        assert f"client 0's update must have {first}, got none" in reason


def test_weights_that_overflow_together_are_rejected() -> None:
    server = serve("ferret")
    (reason,) = play(server, update(server, 0, weight=1e308))
    assert "must have weight in [2^-64, 2^64], got 1e+308" in reason
    server = serve("ferret")
    assert not play(server, *(update(server, client, weight=2.0**64) for client in range(CLIENTS)))
    replica = client_of(server)
    server.algorithm.rebuild(replica, server.broadcasts[1])
    assert replica.weights == server.replica.weights


def test_a_norm_beyond_float64_is_rejected() -> None:
    server = serve("fedavg", gallery.toy(torch.float64))
    values = {name: np.full_like(value, 1e308) for name, value in values_of(server, 0).items()}
    (reason,) = play(server, update(server, 0, values=values))
    assert reason == "norm must be finite, got inf"


@pytest.mark.parametrize("name", [name for name in gallery.ALGORITHMS if name != "feedsign"])
def test_the_largest_floats_of_all_clients_stop_the_round_or_give_finite_weights(name: str) -> None:
    server = serve(name)
    start = [param.clone() for param in server.replica.params]
    hostile = []
    for client in range(CLIENTS):
        values = values_of(server, client)
        floats = {
            key: np.full_like(value, np.finfo(value.dtype).max)
            for key, value in values.items()
            if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        }
        hostile.append(update(server, client, values={**values, **floats}))
    try:
        play(server, *hostile)
    except (NotFiniteError, QuorumError):
        assert server.replica.round == 0
        assert server.broadcasts[1:] == []
    else:
        assert all(param.isfinite().all() for param in server.replica.params)
        assert not all(map(torch.equal, start, server.replica.params))


def test_a_seed_counts_as_used_only_once_its_round_counts() -> None:
    """Else a run that is resumed, which knows the rounds that count, would reject other updates."""
    server = serve("ferret", robust=None)
    loud = changed(server, gammas=np.full(40, 1e6, np.float32))
    (reason,) = play(server, loud)
    assert "norm must be at most" in reason
    seed = wire.decode(loud).seed("seed")
    assert seed not in server.admission.used
    assert not play(server, changed(server, seed=seed))
    assert seed in server.admission.used
    before = set(server.admission.used)
    with pytest.raises(QuorumError):
        server.apply(range(CLIENTS), [Sent(0, b"")])
    assert server.admission.used == before


def test_reference_mode_clips_by_vectors_of_length_zero() -> None:
    """A block of one element whose basis element is 0: nothing to clip, and nothing to divide by."""
    server = serve("ferret-ref")
    pool = np.full(server.replica.plan.K, HUGE, np.float32)
    zero = lambda *_, **__: torch.zeros(3)  # noqa: E731
    module = "ferret_ext.federated.algorithms.ferret_reference.ferret_ext.basis"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, zero)
        assert server.algorithm._clip(server.replica, pool).tolist() == pool.tolist()


# ---- broadcasts ----

SEEDS = [
    ("ferret-ref", 0, "seed"),
    ("fedkseed", 0, "seed"),
    ("fedkseed", 1, "seed"),
    ("fedkseed-pro", 1, "seed"),
    ("decomfl", 0, "next_seed"),
    ("decomfl", 1, "seed"),
    ("feedsign", 1, "next_seed"),
]


@pytest.mark.parametrize(("name", "round_", "key"), SEEDS)
def test_negative_seeds_are_refused(name: str, round_: int, key: str) -> None:
    server = serve(name)
    gallery.play(server)
    bad = relayed([serve(name).broadcasts[0], server.broadcasts[1]][round_], **{key: -1})
    replica = client_of(server) if round_ else server.algorithm.replicate(gallery.toy())
    with pytest.raises(WireError, match=rf"broadcast must have {key} as a whole number in \[0, 2\^64\)"):
        server.algorithm.rebuild(replica, bad)


@pytest.mark.parametrize("factor", [1e308, -1.0, 1.0001])
def test_factors_only_scale_down(factor: float) -> None:
    server = serve("ferret")
    gallery.play(server)
    with pytest.raises(WireError, match=r"broadcast must have factors in \[0, 1\], got"):
        server.algorithm.rebuild(
            client_of(server), relayed(server.broadcasts[1], factors=np.full(CLIENTS, factor))
        )


@pytest.mark.parametrize(("name", "values"), [("fedkseed", "sums"), ("decomfl", "slopes")])
def test_steps_beyond_float32_are_refused_before_a_weight_moves(name: str, values: str) -> None:
    server = serve(name)
    gallery.play(server)
    algorithm = copy.copy(server.algorithm)
    object.__setattr__(algorithm, "server_learning_rate", 1e9)
    replica = algorithm.replicate(gallery.toy())
    algorithm.rebuild(replica, algorithm.open(replica))
    start = [param.clone() for param in replica.params]
    bad = wire.decode(server.broadcasts[1]).values
    size = np.shape(bad[values])
    message = Message(
        name, "broadcast", replica.digest, 1, values={**bad, values: np.full(size, HUGE, np.float32)}
    )
    with pytest.raises(NotFiniteError, match="steps must be finite in float32"):
        algorithm.rebuild(replica, wire.encode(message))
    assert all(map(torch.equal, start, replica.params))


@pytest.mark.parametrize(
    "nested", [[b""] * 60_000, [b"FRET\5"] * 60_000, None], ids=["empty", "begun", "itself"]
)
def test_a_broadcast_of_broadcasts_is_refused_at_once(nested: list[bytes] | None) -> None:
    server = serve("ferret")
    gallery.play(server)
    bad = relayed(server.broadcasts[1], updates=nested or [server.broadcasts[1]] * 1000)
    start = time.process_time()
    with pytest.raises(WireError):
        server.algorithm.rebuild(client_of(server), bad)
    assert time.process_time() - start < 2


def test_an_opening_that_says_more_is_refused() -> None:
    for name in gallery.ALGORITHMS:
        server = serve(name)
        with pytest.raises(WireError, match="broadcast must have no values"):
            server.algorithm.rebuild(
                server.algorithm.replicate(gallery.toy()), relayed(server.broadcasts[0], x=1)
            )


# ---- ledgers ----


def written(path: Path, edit: Callable[[dict[str, wire.Value]], None], which: int = 1) -> Server[Any]:
    """A ledger of one round of which one record is edited under right hashes; a server to replay it."""
    server = serve("ferret")
    opening = journal.opening_record(server, Genesis(bytes(32), "{}"))
    gallery.play(server)
    outcome = Outcome(1, [0, 1, 2], [], [], [0, 1, 2], [bytes(32)] * 3, 0.5, 10, 20)
    previous, content = bytes(32), b""
    for round_, record in enumerate([opening, journal.record_of(server, outcome)]):
        values = {"previous": previous, **record.values}
        if round_ == which:
            edit(values)
        fields = (record.algorithm, "record", record.digest, round_)
        data = wire.encode(Message(*fields, values=values, run=record.run, weights=record.weights))
        content += struct.pack("<Q", len(data)) + data
        previous = hashlib.sha256(data).digest()
    path.write_bytes(content)
    head = {"records": 2, "bytes": len(content), "sha256": previous.hex()}
    path.with_name("ledger.head").write_text(json.dumps(head))
    return serve("ferret")


def setter(name: str, value: Any) -> Callable[[dict[str, wire.Value]], None]:
    return lambda values: values.update({name: value})


@pytest.mark.parametrize(
    ("which", "edit", "message"),
    [
        (1, setter("x", 1), "record must have no values but .*, got x"),
        (1, lambda values: values.pop("clients"), "record must have clients, got none"),
        (1, setter("clients", 3), "clients as ndarray, got int"),
        (1, setter("clients", np.zeros((1, 1), np.uint32)), r"clients as uint32 of shape \[1\]"),
        (1, setter("reasons", [b"\xff"]), r"rejected as uint32 of shape \[1\], got uint32 of shape \[0\]"),
        (1, setter("updates", []), r"accepted as uint32 of shape \[0\]"),
        (1, setter("updates", [b"", b"", b""]), "hashes must have 32 bytes, got 0"),
        (1, setter("bytes_up", -1), "bytes_up and bytes_down must be at least 0"),
        (1, setter("train_loss", "none"), "train_loss as float, got str"),
        (0, setter("base", b"short"), "hashes must have 32 bytes, got 5"),
        (0, setter("train_loss", 0.5), "no values but previous, broadcast, base, config, got train_loss"),
        (0, lambda values: values.pop("base"), "record must have base, got none"),
    ],
)
def test_records_have_what_they_must_have(
    tmp_path: Path, which: int, edit: Callable[[dict[str, wire.Value]], None], message: str
) -> None:
    written(tmp_path / "ledger", edit, which)
    with pytest.raises(LedgerError, match=message):
        list(ledger.read(tmp_path / "ledger"))


def test_a_reason_that_is_no_text_is_refused(tmp_path: Path) -> None:
    edit = {"reasons": [b"\xff"], "rejected": np.zeros(1, np.uint32)}
    written(tmp_path / "ledger", lambda values: values.update(edit))
    with pytest.raises(LedgerError, match="reasons must be UTF-8"):
        list(ledger.read(tmp_path / "ledger"))


def test_a_record_with_another_rounds_broadcast_is_refused(tmp_path: Path) -> None:
    """A replica passes over what it has applied, so the round would be missing from then on."""
    server = written(tmp_path / "ledger", setter("broadcast", serve("ferret").broadcasts[0]))
    gallery.play(server)
    record = list(ledger.read(tmp_path / "ledger"))[1]
    with pytest.raises(LedgerError, match="record 2 must have the broadcast of its own round"):
        journal.replay(server, dataclasses.replace(record, round=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1000, "cannot be read"),
        ('{"records": ' * 80, "cannot be read"),
        (" " * 2000, "at most 1024 bytes"),
        ('{"records": 2, "bytes": 9, "sha256": "\\u001b[2J"}', "must say records, bytes and sha256"),
        ('{"records": 2, "bytes": 1e3, "sha256": "' + "0" * 64 + '"}', "must say records"),
    ],
)
def test_a_hostile_head_is_named(tmp_path: Path, text: str, message: str) -> None:
    written(tmp_path / "ledger", lambda values: None)
    (tmp_path / "ledger.head").write_text(text)
    with pytest.raises(LedgerError, match=message):
        ledger.read_head(tmp_path / "ledger")


def test_a_head_that_lies_about_the_length_would_overwrite_records(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    written(path, lambda values: None)
    said = json.loads((tmp_path / "ledger.head").read_text())
    (tmp_path / "ledger.head").write_text(json.dumps({**said, "bytes": said["bytes"] - 100}))
    with pytest.raises(LedgerError, match=r"expected 2 records of \d+ bytes in .*, got \d+ bytes"):
        Ledger.open(path)


@pytest.mark.parametrize("name", ["ledger", "ledger.head"])
def test_pipes_and_folders_in_the_place_of_files_are_refused(tmp_path: Path, name: str) -> None:
    for make in (os.mkfifo, os.mkdir):
        folder = tmp_path / make.__name__
        folder.mkdir()
        written(folder / "ledger", lambda values: None)
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(LedgerError):
            list(ledger.read(folder / "ledger"))


def test_snapshots_of_other_shapes_are_passed_over(tmp_path: Path) -> None:
    server = serve("ferret")
    gallery.play(server)
    snapshots = Snapshots(tmp_path / "snapshots", LedgerConfig(snapshot_every=1))
    snapshots.save(server)
    assert [found.round for found in snapshots.newest(server, 1)] == [1]
    path = tmp_path / "snapshots" / "round-1.safetensors"
    whole = load_file(path)
    for other in (whole["0"].reshape(-1), whole["0"].view(torch.int32)):
        save_file({**whole, "0": other.clone()}, path)
        assert not list(snapshots.newest(server, 1))


def test_optimisers_of_other_names_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "client-1-round-1.safetensors")
    states: OptimizerStates = {}
    with pytest.raises(LedgerError, match=r"client-1-round-1\.safetensors cannot be read"):
        Optimizers(tmp_path, states).load(1)


def test_messages_of_msgpacks_other_types_are_refused() -> None:
    for value in (msgpack.Timestamp(1), {"a": 1}, [[]], None):
        with pytest.raises(WireError):
            wire.decode(framed(head_with(values={"x": value})))
