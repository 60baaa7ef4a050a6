"""A client that keeps its model, data, optimiser and place in the run from one call to the next."""

from __future__ import annotations

import copy
import gc
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ferret_ext.federated import config as configuration
from ferret_ext.federated import run
from ferret_ext.federated.client import LocalTrainer, OptimizerStates
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.errors import RunError
from ferret_ext.federated.members import Members, client_weights
from ferret_ext.federated.secure.participant import Participant
from ferret_ext.federated.settings import ConfigError, Setting, flatten
from ferret_ext.federated.wire import NO_DIGEST
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Asked, CallError, Frame, Train

if TYPE_CHECKING:
    from ferret_ext.federated.ranks import Ranks

# Settings and sections that a party may set for itself; all others are the server's.
OWN = (
    *("model", "data", "device", "num_threads", "allow_pickle", "dataset", "privacy"),
    *("training.gradient_checkpointing", "training.start_on_host", "training.torch_compile"),
    "zeroth_order.snapshot",
    "ferret.secure_aggregation",  # set: the party takes part in no run that shows its update to the server
)
# Those that no server may set: they are of this machine, name files on it, or lower its guard.
NEVER_THE_SERVERS = (
    *("model", "data", "device", "num_threads", "allow_pickle"),
    *("dataset.labels_file", "dataset.task_lists", "dataset.config_name"),
)

Say = Callable[[str], None]


@dataclass
class Member:
    """The client's part in a run. kept: of its optimiser, after each of the newest two rounds."""

    run: bytes
    members: Members
    trainer: LocalTrainer
    config: SimulationConfig
    kept: dict[int, OptimizerStates] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """How many broadcasts it has taken in."""
        replica = self.members.replica
        return replica.round + 1 if replica.run != NO_DIGEST else 0

    def restore(self, round_: int) -> None:
        """Takes the optimiser back to where it was before this round, which may have been tried before."""
        before = max((done for done in self.kept if done < round_), default=None)
        self.trainer.states.clear()
        if before is not None:
            self.trainer.states.update(copy.deepcopy(self.kept[before]))

    def keep(self, round_: int) -> None:
        newest = max((done for done in self.kept if done < round_), default=round_)
        self.kept = {done: self.kept[done] for done in (newest,) if done in self.kept}
        self.kept[round_] = dict(self.trainer.states)


class Worker:
    """Answers the calls of `worker.calls` for one client, one after the other.

    client: who it is; None: all of a run's clients, which take turns with one model, as in a simulation.
    `answer` does not raise for a bad call or for want of memory. Only `greet` is for other threads.
    """

    def __init__(
        self,
        client: int | None,
        own: Sequence[Setting],
        say: Say,
        *,
        share: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        """own: this party's settings, among them model and data. share: it trains on the client's part of the
        data as the run's settings deal them out, instead of all. ranks: this process is one of several that
        do so together, each asked the same. Raises ConfigError."""
        assert client is not None or share, "all clients cannot have all of the data"
        self.client = client
        self._ranks = ranks
        self._own, self._share, self._say = check_own(own), share, say
        self._member: Member | None = None
        # A client's keys, of which a worker that is started again has none.
        self._participants = {} if client is None else {client: Participant(client)}
        # The newest update's run, round, client, invitation and answer.
        self._last: tuple[bytes, int, int, bytes, Frame] | None = None
        self._place = NO_DIGEST, 0  # run and broadcasts seen, for whoever asks meanwhile

    def greet(self, client: int | None = None) -> Frame:
        """Who this is and how far, from any thread. client: which of all, where it is all of them."""
        who, (run_, seen) = self.client if client is None else client, self._place
        assert who is not None, "one of all clients has to be named"
        return calls.hello(who, run_, seen)

    def attend(self, call: Frame, answered: Callable[[Frame], None]) -> None:
        """Has a call answered."""
        answered(self.answer(call))

    def answer(self, frame: Mapping[str, Any]) -> Frame:
        """The answer to a call: a reply, or an error."""
        answer = self._try(frame)
        if answer["kind"] == "error" and answer["type"] != CallError.__name__:
            _free_memory()  # now that no traceback holds tensors any more
        member = self._member
        self._place = (member.run, member.seen) if member else (NO_DIGEST, 0)
        return answer

    def _try(self, frame: Mapping[str, Any]) -> Frame:
        try:
            return (
                self._ask(Asked.read(frame)) if frame.get("kind") == "ask" else self._train(Train.read(frame))
            )
        except (ValueError, RunError) as problem:  # calls, settings, data and messages that do not fit
            return self._error(problem)
        except Exception as problem:
            self._say(traceback.format_exc())
            return self._error(problem)

    def _ask(self, call: Asked) -> Frame:
        self._check_client(call)
        if call.client not in self._participants:
            raise CallError("kind: expected train where clients take turns, got ask")
        return calls.reply(self._participants[call.client].reply(call.request))

    def _check_client(self, call: Train | Asked) -> None:
        if self.client not in (None, call.client):
            raise CallError(f"client: expected {self.client}, which this worker is, got {call.client}")

    def _train(self, call: Train) -> Frame:
        self._check_client(call)
        if self._last and self._last[:4] == (call.run, call.round, call.client, call.invitation):
            return self._last[4]  # asked again, because the answer was lost
        member = self._member
        begun = self.client is None and member is not None and member.run == call.run
        if call.settings and not begun:  # the server begins at the beginning
            member = self._begin(call)
        elif member is None or member.run != call.run or call.round <= member.members.replica.round:
            return calls.behind(0)
        if call.since > member.seen:
            return calls.behind(member.seen)
        answer = self._update(member, call)
        if not answer["failure"]:
            self._last = call.run, call.round, call.client, call.invitation, answer
        return answer

    def _begin(self, call: Train) -> Member:
        """Loads model and data for the run. Raises ConfigError and DataError."""
        if self._member is not None:
            self._member = self._last = None  # room for what comes
            _free_memory()
        config = party_config(call.settings, self._own)
        if self.client is None:
            _check_turns(config)
        self._say(f"run {call.run.hex()}: client {call.client} loads {config.model} and {config.data}")
        with run.reproducible(config.full_determinism, config.num_threads):
            start = run.begin(config, call.settings, self._ranks)
            if start.genesis.base != call.base:
                raise ConfigError(
                    f"model: expected the run's base of SHA-256 {call.base.hex()}, got "
                    f"{start.genesis.base.hex()} with {config.model!r}"
                )
            if start.genesis.run != call.run:
                raise CallError(
                    f"run: expected {start.genesis.run.hex()} by its settings, got {call.run.hex()}"
                )
            examples = self._examples(start)
        weights = client_weights(start.config, start.algorithm, list(examples.values()))
        own = examples, dict(zip(examples, weights, strict=True))
        on_host = start.config.training.start_on_host
        members = Members(
            start.algorithm, start.model, *own, config.seed, self._participants, start_on_host=on_host
        )
        self._member = Member(call.run, members, start.trainer, start.config)
        return self._member

    def _examples(self, start: run.Start) -> dict[int, Sequence[Any]]:
        """By client."""
        source = start.config, start.tokenizer, start.max_length, self._say
        if self.client is not None and not self._share:
            return {self.client: loading.load_own(*source)}
        shards = loading.load(*source).shards
        if self.client is None:
            return dict(enumerate(shards))
        if self.client >= len(shards):
            raise ConfigError(
                f"client: expected at most {len(shards) - 1}, the last share, got {self.client}"
            )
        return {self.client: shards[self.client]}

    def _update(self, member: Member, call: Train) -> Frame:
        config = member.config
        with run.reproducible(config.full_determinism, config.num_threads):
            member.restore(call.round)
            try:
                done = member.members.update(call.client, call.round, call.broadcasts, call.invitation)
            except BaseException:
                self._settle(member, call.round)
                raise
        member.keep(call.round)
        self._say(f"round {call.round}: {done.failure or f'{len(done.payload):,} bytes to send'}")
        return calls.reply(done)

    def _settle(self, member: Member, round_: int) -> None:
        """After an error: keeps the weights if training alone has touched them; else they are made anew."""
        replica = member.members.replica
        for param in replica.params:
            param.grad = None
        cut = bool(replica.cut)  # other ranks' parts, and what FSDP2 was in the middle of, are not known
        if cut or not replica.marked == replica.round == round_ - 1:
            self._member = None

    def _error(self, problem: BaseException) -> Frame:
        kind = type(problem).__name__
        answer = calls.error(kind, str(problem) or kind)
        self._say(f"error: {answer['type']}: {answer['text']}")
        return answer


def is_own(key: str) -> bool:
    """Whether a party may set this for itself."""
    return any(f"{key}.".startswith(f"{name}.") for name in OWN)


def check_own(own: Sequence[Setting]) -> list[Setting]:
    """The settings, once they are known to be a party's own. Raises ConfigError."""
    for key, value in own:
        if not is_own(key):
            raise ConfigError(
                f"{key}: expected a setting that a party has for itself ({', '.join(OWN)}), got {value!r}; "
                "the server says all others"
            )
    configuration.build([("ferret.seeds", "shared-round"), *own], required=("model", "data"))
    return list(own)


def _check_turns(config: SimulationConfig) -> None:
    """Raises ConfigError for what needs a client in a process of its own."""
    kept = {
        "training.keep_state": config.training.keep_state,
        "ferret.secure_aggregation": config.ferret.secure_aggregation,
    }
    for key, wanted in kept.items():
        if wanted:
            raise ConfigError(f"{key}: expected false where clients take turns, got true")


def party_config(settings: str, own: Sequence[Setting]) -> SimulationConfig:
    """The server's settings, but for what is this party's own. Raises ConfigError."""
    try:
        told = list(flatten(json.loads(settings)))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"settings: expected those of a run as JSON, got: {error}") from None
    theirs = [(key, value) for key, value in told if key not in NEVER_THE_SERVERS]
    return configuration.build([*theirs, *own], required=("model", "data"))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
