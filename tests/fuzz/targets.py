"""What is fuzzed: what takes bytes from outside, and what it may say to them."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import Script, forge, loosen, mutate, sealed

sys.path.insert(0, str(Path(__file__).parents[1] / "federated"))
import gallery  # type: ignore[import-not-found]

from ferret_ext.federated import journal, ledger, wire
from ferret_ext.federated.admission import Sent
from ferret_ext.federated.errors import DisagreementError, LedgerError, QuorumError, RunError
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.metrics import Outcome
from ferret_ext.federated.secure import messages
from ferret_ext.federated.server import Server
from ferret_ext.federated.wire import NotFiniteError, WireError

Target = Callable[[bytes], None]
LONGEST_REASON = 1000  # characters

# Names of averaged algorithms but one mean the same code.
ALGORITHMS = (
    "ferret",
    "ferret+choice8",
    "ferret-round+int4",
    "ferret-secure",
    "ferret-ref",
    "fedavg",
    "fedkseed",
    "fedkseed-pro",
    "decomfl",
    "feedsign",
)


def check_short(error: Exception) -> None:
    """Texts of errors go to logs, ledgers and terminals."""
    assert len(str(error)) <= LONGEST_REASON, f"an error of {len(str(error))} characters"
    assert str(error).isprintable(), f"an error that is not printable: {error!r}"


# ---- wire ----


def wire_target() -> Target:
    """`wire.decode` takes a message in its one encoding, or raises WireError."""
    honest = []
    for name in ALGORITHMS:
        server = gallery.serve(name)
        honest += [*gallery.play(server)[:1], *server.broadcasts]

    def decode(data: bytes) -> None:
        script = Script(data)
        how = script.below(16)
        made = data if how == 0 else sealed(data) if how == 1 else mutate(script.pick(honest), script)
        try:
            message = wire.decode(made)
        except WireError as error:
            check_short(error)
            return
        assert wire.encode(message) == made, "a second encoding"
        assert wire.encode(wire.decode(made, copy=False)) == made, "another message without copies"

    return decode


# ---- replicas ----


@dataclass
class Mark:
    """A server or replica at one moment, to which it goes back, and with which it is compared."""

    thing: Any

    def __post_init__(self) -> None:
        self.replica = self.thing.replica if isinstance(self.thing, Server) else self.thing
        self.params = [param.detach().clone() for param in self.replica.params]
        self.fields = copy.copy(vars(self.replica))
        self.state = self._state()
        if isinstance(self.thing, Server):
            self.used = copy.deepcopy(self.thing.admission.used)
            self.broadcasts = list(self.thing.broadcasts)

    def _state(self) -> Any:
        state = dict(self.replica.state())
        kept = {
            name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in state.items()
        }
        return kept, self.replica.round, self.replica.run, self.replica.weights, self.replica.digest

    def assert_unchanged(self) -> None:
        assert all(map(torch.equal, self.params, self.replica.params)), "weights have changed"
        assert self._state() == self.state, "the replica's state has changed"
        if isinstance(self.thing, Server):
            assert self.thing.admission.used == self.used, "seeds were taken as used"
            assert self.thing.broadcasts == self.broadcasts, "a broadcast was kept"

    @torch.no_grad()
    def go_back(self) -> None:
        vars(self.replica).update(self.fields)
        for param, value in zip(self.replica.params, self.params, strict=True):
            param.copy_(value)
        if isinstance(self.thing, Server):
            self.thing.admission.used = copy.deepcopy(self.used)
            self.thing.broadcasts = list(self.broadcasts)


def server_target(name: str) -> Target:
    """`Server.apply` takes or rejects what clients send. A round that does not count changes nothing."""
    server = gallery.serve(name)
    former = gallery.play(server)
    honest = [gallery.update(server, client) for client in range(gallery.CLIENTS)]
    bases = [*enumerate(honest), *enumerate(honest), (0, former[0]), (1, server.broadcasts[-1])]
    bases.append((0, wire.encode(_dissent(server))))
    mark = Mark(server)

    def apply(data: bytes) -> None:
        script = Script(data)
        sent = []
        for _ in range(1 + script.below(3)):
            client, base = script.pick(bases)
            client = client if script.below(8) else script.below(4)
            sent.append(Sent(client, mutate(base, script)))
        if script.below(2):
            sent.append(Sent(2, honest[2]))
        try:
            updates, rejections = server.apply(range(gallery.CLIENTS), sent)
        except RunError as error:
            if not isinstance(error, QuorumError):
                check_short(error)
            mark.assert_unchanged()
        except NotFiniteError as error:
            check_short(error)
        else:
            for rejection in rejections:
                check_short(ValueError(rejection.reason))
            assert len(updates.messages) + len(rejections) == len(sent)
            assert server.replica.round == mark.replica.round
            assert all(param.isfinite().all() for param in server.replica.params)
            wire.encode(journal.record_of(server, _outcome(server, updates, rejections)))
        finally:
            mark.go_back()

    return apply


def _outcome(server: Server[Any], updates: Any, rejections: Any) -> Outcome:
    return Outcome(
        server.replica.round,
        rejected=rejections,
        accepted=[message.client for message in updates.messages],
        updates=[bytes(32)] * len(updates.messages),
    )


def _dissent(server: Server[Any]) -> wire.Message:
    digests = np.zeros(8 * len(server.replica.params), np.uint8)
    return wire.Message(
        server.algorithm.name,
        "dissent",
        server.replica.digest,
        server.replica.round + 1,
        0,
        values={"digests": digests},
        run=server.replica.run,
    )


def client_target(name: str) -> Target:
    """A client rebuilds, or raises WireError or DisagreementError; then another broadcast puts it right."""
    server = gallery.serve(name, verify_weights=True)
    replica = server.algorithm.replicate(gallery.toy())
    gallery.play(server)
    fresh = Mark(replica)
    server.algorithm.rebuild(replica, server.broadcasts[0] or _opening(name))
    opened = Mark(replica)
    broadcasts = [server.broadcasts[0] or _opening(name), server.broadcasts[1]]
    unverified = gallery.serve(name, verify_weights=False)
    gallery.play(unverified)

    def rebuild(data: bytes) -> None:
        script = Script(data)
        mark = script.pick((fresh, opened))
        base = script.pick((*broadcasts, unverified.broadcasts[-1]))
        mark.go_back()
        try:
            server.algorithm.rebuild(replica, mutate(base, script))
        except DisagreementError as error:
            check_short(error)
        except WireError as error:
            check_short(error)
            assert all(map(torch.equal, mark.params, replica.params)), "weights have changed"
        mark.go_back()
        if script.below(8) == 0:
            for broadcast in broadcasts:
                server.algorithm.rebuild(replica, broadcast)
            assert replica.weights == server.replica.weights

    return rebuild


def _opening(name: str) -> bytes:
    opening: bytes = gallery.serve(name).broadcasts[0]
    return opening


# ---- participants ----


def participant_target() -> Target:
    """A client in a masked round answers, or says why not; and never tells both the seed that it shares with
    another client and its share of the other's seed, nor shares for two sums."""
    masked = gallery.masked_round(1, 40)
    honest = _requests(masked)

    def answer(data: bytes) -> None:
        script = Script(data)
        participant = copy.deepcopy(masked.circle.participants[1])
        opened: set[int] = set()
        sums: set[tuple[int, ...]] = set()
        for _ in range(1 + script.below(4)):
            request = mutate(script.pick(honest), script)
            reply = participant.reply(request)
            if reply.failure:
                check_short(ValueError(reply.failure))
                continue
            values = wire.decode(request).values
            if "dropped" in values:
                opened |= set(values["dropped"].tolist())
            if "survivors" in values:
                sums.add(tuple(values["survivors"].tolist()))
            assert len(sums) <= 1, "shares of two sums"
            assert not any(opened & set(one) for one in sums), "both seed and share"

    return answer


def _requests(masked: Any) -> list[bytes]:
    """All that an honest server might ask client 1."""
    updates = [
        wire.Message(messages.NAME, "update", bytes(8), 1, client, values=values)
        for client, values in masked.hidden.items()
    ]
    fixed = masked.about, masked.session, 0
    made = [messages.write("request", "keys", *fixed), masked.invitation]
    for survivors in ([0, 1, 2], [0, 1], [1, 2]):
        sealed = masked._sealed_for(1, [updates[client] for client in survivors])
        named = messages.numbers(survivors)
        made.append(messages.write("request", "shares", *fixed, survivors=named, sealed=sealed))
        dropped = messages.numbers([client for client in (0, 2) if client not in survivors])
        made.append(messages.write("request", "pairs", *fixed, dropped=dropped))
    return made


# ---- ledger ----


def ledger_target() -> Target:
    """`ledger.read`, `Ledger.open` and `journal.replay` raise LedgerError, or find other weights."""
    memory = Path("/dev/shm")  # no disk is needed
    folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    path = Path(folder.name) / "ledger"
    runs = [_written(name, path) for name in ("ferret", "fedkseed-pro")]

    def read(data: bytes, _: object = folder) -> None:
        script = Script(data)
        records, head, mark = script.pick(runs)
        content = _hostile_content(records, script)
        path.write_bytes(content)
        if (beside := _hostile_head(content, head, script)) is None:
            path.with_name("ledger.head").unlink(missing_ok=True)
        else:
            path.with_name("ledger.head").write_bytes(beside)
        try:
            if beside is not None and script.below(4) == 0:
                ledger.Ledger.open(path).close()
            for record in list(ledger.read(path))[1:]:
                journal.outcome_of(record)
                journal.replay(mark.thing, record)
        except (LedgerError, DisagreementError) as error:
            check_short(error)
        finally:
            mark.go_back()

    return read


def _written(name: str, path: Path) -> tuple[list[bytes], dict[str, Any], Mark]:
    """An honest ledger of three rounds: its records and head; and a server at its beginning."""
    server = gallery.serve(name)
    mark = Mark(gallery.serve(name))
    kept = ledger.Ledger.create(path)
    kept.append(journal.opening_record(server, Genesis(bytes(32), json.dumps({"algorithm": name}))))
    for round_ in range(1, 4):
        gallery.play(server)
        clients = list(range(gallery.CLIENTS))
        outcome = Outcome(round_, clients, [], [], clients, [bytes(32)] * 3, 0.5, 10, 20)
        kept.append(journal.record_of(server, outcome))
    kept.close()
    return [wire.encode(record) for record in ledger.read(path)], dict(vars(kept.head)), mark


def _hostile_content(records: list[bytes], script: Script) -> bytes:
    """A ledger's bytes: some records changed, and chained anew or not; or cut, or as they were."""
    if script.below(4) == 0:
        return _file_of(records)
    made, previous = [], bytes(32)
    for record in records:
        if script.below(2):
            record = mutate(record, script)
        if script.below(4):
            record = _chained(record, previous)
        previous = hashlib.sha256(record).digest()
        made.append(record)
    content = _file_of(made)
    if script.below(4):
        return content
    return content[: script.below(len(content) + 1)] + script.pick((b"", b"\xff" * 9, bytes(8), bytes(20)))


def _file_of(records: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(record)) + record for record in records)


def _hostile_head(content: bytes, head: dict[str, Any], script: Script) -> bytes | None:
    """A head that fits, lies, or is no head; none where there shall be none."""
    said: dict[str, Any] = {**head, "bytes": len(content), "sha256": _last_hash(content) or head["sha256"]}
    how = script.below(8)
    if how == 0:
        return None
    if how == 1:
        lies = (0, 1, -1, 3, 5, 2**70, 1e300, "", "zz", "0" * 64, "\x1b" * 64, None, [], True)
        said[script.pick(("records", "bytes", "sha256", "more"))] = script.pick(lies)
    if how == 2:
        odd = ("", "[]", "null", "[" * 900, "{" * 1024, '{"a":' * 200, "\x00", "1" * 1024, " " * 5000)
        return script.pick((*odd, '"\\ud800"', '{"records": 1e999}')).encode()
    return json.dumps(said).encode()


def _last_hash(content: bytes) -> str | None:
    """Of the last record in a whole file."""
    last, at = None, 0
    while at < len(content):
        if len(content) - at < 8:
            return None
        end = at + 8 + int.from_bytes(content[at : at + 8], "little")
        last, at = content[at + 8 : end], end
    return hashlib.sha256(last).hexdigest() if last is not None and at == len(content) else None


def _chained(record: bytes, previous: bytes) -> bytes:
    try:
        fields = loosen(record)
    except WireError:
        return record
    fields["values"]["previous"] = previous
    return forge(fields)


def all_targets() -> Target:
    """The first byte says which of the others."""
    targets = [make() for name, make in TARGETS.items() if name != "all"]
    return lambda data: targets[Script(data[:1]).below(len(targets))](data[1:])


TARGETS: dict[str, Callable[[], Target]] = {
    "all": all_targets,
    "wire": wire_target,
    "ledger": ledger_target,
    "participant": participant_target,
    **{f"server-{name}": partial(server_target, name) for name in ALGORITHMS},
    **{f"client-{name}": partial(client_target, name) for name in ALGORITHMS},
}


def prepare() -> None:
    """One thread, and warnings of numpy as errors: an overflow that nobody expected is a finding."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", RuntimeWarning)
