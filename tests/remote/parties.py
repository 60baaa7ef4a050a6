"""A small run whose clients are workers, and a link to them in this process."""

from __future__ import annotations

import atexit
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from ferret_ext.federated import config as configuration
from ferret_ext.federated import run
from ferret_ext.federated.admission import Sent
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.engines.flower.link import serve
from ferret_ext.federated.engines.in_process import simulate
from ferret_ext.federated.engines.remote import Link
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.metrics import Rejection, RoundMetrics
from ferret_ext.federated.report import RunFolder
from ferret_ext.federated.run import Result
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import Setting, read_override
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame, Train
from ferret_ext.federated.worker.worker import Worker
from ferret_link import frames

MODEL = "builtin:tiny-llama"
RUN = [
    *("rounds=3", "num_clients=3", "client_fraction=0.67", "dataset.max_length=96", "training.max_steps=1"),
    *("ferret.K=48", "training.gradient_accumulation_steps=1", "training.learning_rate=0.05"),
    *("evaluation.max_samples=2", "server_learning_rate=0.5", "num_threads=1", "federation.poll=0.01"),
]


@cache
def data() -> str:
    """A folder of 24 records to train on and 4 to evaluate, for the whole session."""
    folder = Path(mkdtemp(prefix="ferret-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split, count in (("train", 24), ("test", 4)):
        rows = [
            {"question": f"What is {n} plus {n}?", "answer": f"{n}+{n}\n#### {2 * n}"} for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def settings(out: Path, *more: str) -> SimulationConfig:
    given: list[Setting] = [("model", MODEL), ("data", data()), ("out", str(out))]
    return configuration.build([*given, *map(read_override, [*RUN, *more])])


def own(*more: str) -> list[Setting]:
    """What a party says for itself."""
    return [("model", MODEL), ("data", data()), ("num_threads", "1"), *map(read_override, more)]


def worker(client: int | None, *more: str, share: bool = True) -> Worker:
    return Worker(client, own(*more), lambda _: None, share=share)


MORE = ("num_clients=1", "client_fraction=1", "training.keep_state=true", "training.momentum=0.9")


class Leader:
    """A server that asks one worker."""

    def __init__(self, *more: str) -> None:
        start = run.begin(settings(Path("nowhere"), *MORE, *more))
        self.genesis: Genesis = start.genesis
        self.server: Server[Any] = Server(start.algorithm, start.model, [0], 1.0, 0, run=self.genesis.run)

    def call(self, since: int = 0, **changes: Any) -> Frame:
        """The next round's call to a client that has seen so many broadcasts."""
        told = (self.genesis.config, self.genesis.base) if since == 0 else ()
        broadcasts = self.server.broadcasts_since(since)
        call = Train(self.genesis.run, len(self.server.broadcasts), 0, since, broadcasts, *told)
        return {**call.frame(), **changes}

    def take(self, answer: Frame) -> None:
        assert answer["kind"] == "reply", answer
        _, rejected = self.server.apply([0], [Sent(0, answer["payload"])])
        assert not rejected


def ask(path: Path, call: Frame, timeout: float = 60) -> Frame:
    with frames.connect(path, timeout) as connection:
        frames.send(connection, call)
        answer = frames.receive(connection)
    assert answer is not None
    return answer


class Party:
    """A node with a worker behind it. before: what happens to a call on its way, if anything does."""

    def __init__(self, member: Worker) -> None:
        self.worker = member
        self.calls: list[Frame] = []
        self.before: Callable[[Frame], Frame | None] = lambda call: None

    def answer(self, call: Frame) -> Frame:
        self.calls.append(call)
        if (answer := self.before(call)) is not None:
            return answer
        return self.worker.greet() if call["kind"] == "hello" else self.worker.answer(call)


class DirectLink:
    """A `remote.Link` to parties in this process; every call is answered before it is asked after."""

    def __init__(self, parties: dict[int, Party]) -> None:
        self.parties = parties
        self._answers: dict[str, Frame] = {}
        self._count = 0

    def nodes(self) -> list[int]:
        return list(self.parties)

    def send(self, node: int, frame: Frame) -> str | None:
        if node not in self.parties:
            return None
        self._count += 1
        self._answers[str(self._count)] = self.parties[node].answer(frame)
        return str(self._count)

    def receive(self, names: Collection[str]) -> Iterator[tuple[str, Frame]]:
        for name in list(names):
            if name in self._answers and self._answers[name].get("kind") != "lost":
                yield name, self._answers.pop(name)


def lost(call: Frame) -> Frame:
    """In place of an answer that never comes."""
    return {"kind": "lost"}


def no_worker(call: Frame) -> Frame:
    return calls.error("NoWorker", "no worker answers")


class Diary:
    """A narrator that keeps what it is told, and the metrics in the run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.lines: list[str] = []
        self.left_out: list[tuple[int, int, str]] = []
        self.metrics: list[RoundMetrics] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def dealt(self, holdings: Holdings) -> None: ...

    def round_begins(self, round_: int, clients: list[int]) -> None: ...

    def client_done(self, round_: int, client: int) -> None: ...

    def client_left_out(self, round_: int, client: int, reason: str) -> None:
        self.left_out.append((round_, client, reason))

    def update_rejected(self, round_: int, rejection: Rejection) -> None: ...

    def round_ends(self, metrics: RoundMetrics, samples: Any) -> None:
        self._folder.append(metrics, samples)
        self.metrics.append(metrics)


def play(config: SimulationConfig, link: Link, run: Any = serve) -> tuple[Result, Diary]:
    """The run, or the rest of it, as a ServerApp plays it."""
    folder = RunFolder(config, resume=True)
    diary = Diary(folder)
    return run(link, config, diary, folder.open_journal), diary


def in_process(link: object, *rest: Any) -> Result:
    """In place of `serve`, for `play`."""
    return simulate(*rest)


def told(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's folder without its seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if not key.startswith("seconds_")} for row in rows]


def weights(result: Result) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in result.model.parameters()])
