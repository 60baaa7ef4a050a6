"""Clients on other machines, on whatever carries calls to them and answers back.

A round sends every client that takes part the broadcasts that it has not seen, and ends with the first of:

    as many updates as the round is after (`Server.wanted`), or an answer of every client;
    the deadline, with at least `robust.quorum` updates, or as many as the algorithm needs;
    `federation.max_deadline`, and then the run stops where updates are fewer.

What else an algorithm asks of clients, before or after, goes the same way, with deadlines of its own.

Clients are known by the number that they say they are, never by their connection: that may change while a
run goes on. A call is repeated when its connection is gone, when it fails on the way, and after the deadline;
before there are reply times after `federation.min_deadline`, then after twice as long and so on, since the
deadline may then be an hour. A client that is asked again answers as before without training again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.config import FederationConfig
from ferret_ext.federated.errors import QuorumError
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.rounds import Watcher
from ferret_ext.federated.server import Server
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Asked, CallError, Frame, Train

QUANTILE = 0.9
ROUNDS_BACK = 5
RETRY = 2.0  # seconds until a call that failed on its way is repeated
HELLO_PATIENCE = 60.0  # seconds until a node that does not say who it is is asked again
HELLO_RETRY = 10.0  # seconds, where it could not say, or is who somebody else is
MOST_BEHIND = 3  # times in a round that a client may have lost what it had seen
SHOWN_CLIENTS = 10  # in one line of the log
UNREACHED = ("NoWorker", "NoAnswer")  # errors of the way, not of the client


class Link(Protocol):
    """Carries frames to nodes and answers back. What it raises ends the run."""

    def nodes(self) -> Collection[int]:
        """Those that are connected."""

    def send(self, node: int, frame: Frame) -> str | None:
        """The call's name; None where it cannot be sent."""

    def receive(self, names: Collection[str]) -> Iterable[tuple[str, Frame]]:
        """The answers that are there, by their calls' names, each once; a failure is a frame of kind "error"
        and type "NoAnswer"."""


class Deadlines:
    """How long a round waits: `deadline_factor` times the 0.9 quantile of the reply times of the last five
    rounds that have any, within `min_deadline` and `max_deadline`; without reply times, `first`, which is
    `max_deadline` unless given.

    The quantile is the smallest time that nine tenths of the times do not exceed. Late replies count too,
    with their round, or else a deadline that is too short would never see that.
    """

    def __init__(self, config: FederationConfig, first: float | None = None) -> None:
        self._config = config
        self._first = first or config.max_deadline
        self._times: dict[int, list[float]] = {}

    def note(self, round_: int, seconds: float) -> None:
        """A reply came this long after its call."""
        self._times.setdefault(round_, []).append(seconds)
        for old in sorted(self._times)[:-ROUNDS_BACK]:
            del self._times[old]

    def patience(self, calls: int) -> float:
        """How long to wait for the answer to the last of so many calls before the next."""
        if self._times:
            return self.seconds
        return min(self.seconds, self._config.min_deadline * 2.0 ** (calls - 1))

    @property
    def seconds(self) -> float:
        times = sorted(seconds for of_round in self._times.values() for seconds in of_round)
        most = self._config.max_deadline
        if not times:
            return self._first
        quantile = times[math.ceil(QUANTILE * len(times)) - 1]
        return min(most, max(self._config.min_deadline, self._config.deadline_factor * quantile))


@dataclass(frozen=True)
class Call:
    """A call under way. stage: of which exchange. timed: its answer's time counts, since nothing has to be
    loaded first. trains: the client is asked for its update."""

    client: int
    node: int
    round: int
    stage: int
    sent_at: float
    bytes_down: int
    timed: bool
    trains: bool


@dataclass
class Stage:
    """An exchange with a round's clients under way, one of several. call: what a client is sent, the bytes of
    messages in it, and whether its answer is timed. enough: answers without failure with which it ends at
    once. least: those with which it ends at the deadline. watcher: of the stage in which clients train.

    not_before: when a client may be called again. behind: how often each had lost what it had seen.
    """

    round: int
    number: int
    clients: Collection[int]
    opened: float
    call: Callable[[int], tuple[Frame, int, bool]]
    enough: int
    least: int
    deadlines: Deadlines
    watcher: Watcher | None
    replies: dict[int, Reply] = field(default_factory=dict)
    not_before: dict[int, float] = field(default_factory=dict)
    behind: dict[int, int] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        return sum(not reply.failure for reply in self.replies.values())


class Roster:
    """Which client is at which node, and how many broadcasts it has seen.

    trusting: a client that is new here may have been in the run before this process was, and is believed.
    """

    def __init__(self, link: Link, clients: int, run: bytes, say: Callable[[str], None]) -> None:
        self._link, self._clients, self._run, self._say = link, clients, run, say
        self._asked: dict[str, tuple[int, float]] = {}  # name of the hello -> node, when
        self._not_before: dict[int, float] = {}  # node -> when it is asked again
        self.trusting = False
        self.node_of: dict[int, int] = {}
        self.seen: dict[int, int] = {}

    def look(self, now: float) -> None:
        """Takes note of nodes that came and went, and of who is there."""
        nodes = set(self._link.nodes())
        for client, node in list(self.node_of.items()):
            if node not in nodes:
                self._say(f"client {client} is no longer connected")
                del self.node_of[client]
        self._not_before = {node: at for node, at in self._not_before.items() if node in nodes}
        unknown = nodes - {*self.node_of.values()}
        self._asked = {name: (node, at) for name, (node, at) in self._asked.items() if node in unknown}
        for node in sorted(unknown - self._not_due(now)):
            if name := self._link.send(node, {"kind": "hello"}):
                self._asked[name] = node, now
        before = {*self.node_of}
        for name, answer in self._link.receive(self._asked) if self._asked else ():
            node, _ = self._asked.pop(name)
            if node not in self.node_of.values():  # it may have been asked twice
                self._welcome(node, answer, now)
        if came := sorted(self.node_of.keys() - before):
            self._say(f"{_in_words(came)} connected")

    def _not_due(self, now: float) -> set[int]:
        """Nodes that need not be asked yet. A slow one is asked again later and later, and each answer heard:
        it answers one after the other, and might always be too late for the last."""
        times: dict[int, list[float]] = {}
        for node, at in self._asked.values():
            times.setdefault(node, []).append(at)
        asked = {node for node, at in times.items() if now < max(at) + HELLO_PATIENCE * 2.0 ** (len(at) - 1)}
        return asked | {node for node, at in self._not_before.items() if now < at}

    def _welcome(self, node: int, answer: Frame, now: float) -> None:
        try:
            if answer.get("kind") == "error":
                raise CallError(f"{answer.get('type')}: {answer.get('text')}")
            client, seen = calls.whole(answer, "client"), calls.whole(answer, "seen")
            run = calls.take(answer, "run", bytes)
            if client >= self._clients:
                raise CallError(f"expected a client of 0 to {self._clients - 1}, got {client}")
            if client in self.node_of:
                raise CallError(f"client {client} is connected elsewhere")
        except CallError as error:
            self._not_before[node] = now + HELLO_RETRY
            self._say(f"a node is not heard: {calls.error('', str(error))['text']}")
            return
        self.node_of[client] = node
        believed = self.seen.get(client, seen if self.trusting else 0)
        self.seen[client] = min(seen, believed) if run == self._run else 0


class RemoteClients:
    """The clients of a run, as `rounds.run_rounds` wants them."""

    def __init__(
        self,
        link: Link,
        config: FederationConfig,
        quorum: int,
        clients: int,
        genesis: Genesis,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._link, self._config, self._quorum, self._genesis = link, config, quorum, genesis
        self._say, self._clock, self._sleep = say, clock, sleep
        self._roster = Roster(link, clients, genesis.run, say)
        self._deadlines = Deadlines(config)
        self._deadlines_of_answers = Deadlines(config, config.min_deadline)
        self._stages = 0
        self._late_replies: list[Reply] = []
        self._calls: dict[str, Call] = {}
        self._heard: set[tuple[int, int]] = set()  # round and client of every update: calls are repeated
        self._gathered = False

    def exchange(self, watcher: Watcher, round_: int, clients: list[int], server: Server[Any]) -> list[Reply]:
        """A round of the clients, see above. Raises QuorumError."""
        if not self._gathered:
            self._roster.trusting = round_ > 1
            self._gather(clients)
        least = max(self._quorum, server.assembly.least)
        enough = max(server.wanted, least)
        call = partial(self._train, round_, server)
        stage = self._open(round_, clients, call, enough, least, self._deadlines, watcher)
        replies = self._converse(stage)
        late, self._late_replies = self._late_replies, []
        return [*replies, *late]

    def ask(self, round_: int, requests: Mapping[int, bytes], enough: int, least: int) -> list[Reply]:
        """What a round's clients say to these requests. Raises QuorumError."""
        if not self._gathered:
            self._roster.trusting = round_ > 1
            self._gather(requests)

        def call(client: int) -> tuple[Frame, int, bool]:
            asked = Asked(self._genesis.run, round_, client, requests[client])
            return asked.frame(), len(requests[client]), True

        deadlines = self._deadlines_of_answers
        return self._converse(self._open(round_, requests, call, enough, least, deadlines))

    def _open(
        self,
        round_: int,
        clients: Collection[int],
        call: Callable[[int], tuple[Frame, int, bool]],
        enough: int,
        least: int,
        deadlines: Deadlines,
        watcher: Watcher | None = None,
    ) -> Stage:
        self._stages += 1
        now = self._clock()
        return Stage(round_, self._stages, clients, now, call, enough, least, deadlines, watcher)

    def _converse(self, stage: Stage) -> list[Reply]:
        """A reply of each of the stage's clients. Raises QuorumError."""
        while True:
            self._roster.look(self._clock())
            self._receive(stage)
            if self._over(stage):
                return [stage.replies.get(client) or self._missing(stage, client) for client in stage.clients]
            self._send(stage)
            self._sleep(self._config.poll)

    def _gather(self, clients: Collection[int]) -> None:
        """Waits for the first round's clients to connect."""
        self._gathered, limit = True, self._clock() + self._config.join_timeout
        self._say(f"waiting for {len(clients)} clients, at most {self._config.join_timeout:g} s")
        while True:
            self._roster.look(self._clock())
            if self._roster.node_of.keys() >= set(clients) or self._clock() >= limit:
                return
            self._sleep(self._config.poll)

    def _send(self, stage: Stage) -> None:
        """Calls whoever was not called yet, or in vain."""
        now = self._clock()
        self._calls = {
            name: call
            for name, call in self._calls.items()
            if stage.round - ROUNDS_BACK <= call.round
            and (call.stage < stage.number or self._roster.node_of.get(call.client) == call.node)
        }
        sent: dict[int, list[float]] = {}
        for call in self._calls.values():
            if call.stage == stage.number:
                sent.setdefault(call.client, []).append(call.sent_at)
        for client in stage.clients:
            due = now >= max(stage.not_before.get(client, now), self._repeat_at(stage, sent.get(client, [])))
            if client in self._roster.node_of and client not in stage.replies and due:
                self._call(stage, client, now)

    def _repeat_at(self, stage: Stage, sent: Sequence[float]) -> float:
        """When to call a client again that was called at these times in vain."""
        return max(sent) + stage.deadlines.patience(len(sent)) if sent else -math.inf

    def _call(self, stage: Stage, client: int, now: float) -> None:
        node, (frame, size, timed) = self._roster.node_of[client], stage.call(client)
        if name := self._link.send(node, frame):
            told = Call(client, node, stage.round, stage.number, now, size, timed, stage.watcher is not None)
            self._calls[name] = told
        else:
            stage.not_before[client] = now + RETRY

    def _train(self, round_: int, server: Server[Any], client: int) -> tuple[Frame, int, bool]:
        since = self._roster.seen[client]
        if since > len(server.broadcasts):  # of a former run of the same name
            since = 0
        told = (self._genesis.config, self._genesis.base) if since == 0 else ("", b"")
        broadcasts, invitation = server.broadcasts_since(since), server.assembly.invitation
        call = Train(self._genesis.run, round_, client, since, broadcasts, *told, invitation)
        return call.frame(), sum(map(len, broadcasts)) + len(invitation), since > 0

    def _receive(self, stage: Stage) -> None:
        for name, answer in self._link.receive(self._calls) if self._calls else ():
            call, now = self._calls.pop(name), self._clock()
            replied = answer.get("kind") == "reply"
            if replied and call.timed:
                of_kind = self._deadlines if call.trains else self._deadlines_of_answers
                of_kind.note(call.round, now - call.sent_at)
            if call.stage == stage.number:
                self._take(stage, call, answer, now)
            elif replied and call.trains and (call.round, call.client) not in self._heard:
                self._heard.add((call.round, call.client))
                self._say(f"client {call.client}: a reply of round {call.round} came late")
                self._late_replies.append(Reply(call.client, b"", 0, math.nan, Stopwatch(), late=True))

    def _take(self, stage: Stage, call: Call, answer: Frame, now: float) -> None:
        """An answer to a call of this stage: a reply, or a reason to call again."""
        client = call.client
        if client in stage.replies:
            return  # it was called twice
        try:
            if answer.get("kind") == "reply":
                reply = calls.read_reply(answer, client, call.bytes_down)
                if stage.watcher:
                    self._heard.add((stage.round, client))
                    self._roster.seen[client] = stage.round
                self._settle(stage, reply)
            elif answer.get("kind") == "behind":
                self._step_back(stage, client, calls.whole(answer, "seen"))
            elif answer.get("kind") == "error" and answer.get("type") in UNREACHED:
                stage.not_before[client] = now + RETRY
                self._say(
                    f"client {client} is called again: {calls.error('', str(answer.get('text')))['text']}"
                )
            else:
                raise CallError(f"{answer.get('type')}: {answer.get('text')}")
        except CallError as error:
            self._settle(stage, _failed(client, calls.error("", str(error))["text"]))

    def _step_back(self, stage: Stage, client: int, seen: int) -> None:
        """The client has lost what it had seen, and is told again."""
        stage.behind[client] = stage.behind.get(client, 0) + 1
        if seen > self._roster.seen[client] or stage.behind[client] > MOST_BEHIND:
            raise CallError(f"it says again that it has seen {seen} broadcasts")
        self._roster.seen[client] = seen

    def _settle(self, stage: Stage, reply: Reply) -> None:
        stage.replies[reply.client] = reply
        if stage.watcher and reply.failure:
            stage.watcher.client_left_out(stage.round, reply.client, reply.failure)
        if stage.watcher:
            stage.watcher.client_done(stage.round, reply.client)

    def _over(self, stage: Stage) -> bool:
        """Whether the stage has all that it waits for. Raises QuorumError."""
        if stage.answers >= stage.enough or len(stage.replies) == len(stage.clients):
            return True
        waited = self._clock() - stage.opened
        if waited >= stage.deadlines.seconds and stage.answers >= stage.least:
            return True
        if waited < self._config.max_deadline:
            return False
        raise QuorumError(
            f"round {stage.round}: expected {'updates' if stage.watcher else 'answers'} of at least "
            f"{stage.least} clients within {self._config.max_deadline:g} s, got {stage.answers}"
        )

    def _missing(self, stage: Stage, client: int) -> Reply:
        """In place of the reply of a client that the round does not wait for any more."""
        waited = self._clock() - stage.opened
        connected = client in self._roster.node_of
        reason = f"no reply within {waited:.1f} s" if connected else "not connected"
        if stage.watcher:
            stage.watcher.client_left_out(stage.round, client, reason)
        return _failed(client, reason)


def _in_words(clients: Sequence[int]) -> str:
    if len(clients) == 1:
        return f"client {clients[0]} is"
    shown = ", ".join(map(str, clients[:SHOWN_CLIENTS]))
    more = len(clients) - SHOWN_CLIENTS
    return f"clients {shown} and {more} more are" if more > 0 else f"clients {shown} are"


def _failed(client: int, reason: str) -> Reply:
    return Reply(client, b"", 0, math.nan, Stopwatch(), reason)
