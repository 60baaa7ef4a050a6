"""Several processes as one client: what they train, project and answer is what one process would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parties import Leader as Server
from parties import ask, data, worker

from ferret_ext.federated import adapters, deploy, ranks, sharded
from ferret_ext.federated import config as configuration
from ferret_ext.federated.ranks import Ranks, own_device
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.sharded import deal
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame
from ferret_ext.federated.worker.team import Leader, follow
from ferret_link.frames import FrameError

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("rank_program.py")
LONG = 900  # seconds for what may be slow on a busy machine

# ---- a step's batches over the ranks


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_every_example_is_dealt_to_one_rank(sizes: list[int], count: int) -> None:
    hands = deal(sizes, count)
    dealt = [
        (part.batch, i)
        for hand in hands
        for part in hand
        if not part.idle
        for i in range(part.start, part.stop)
    ]
    assert sorted(dealt) == [(batch, i) for batch, size in enumerate(sizes) for i in range(size)]
    assert len(hands) == count
    assert len({len(hand) for hand in hands}) == 1, "ranks that make other numbers of passes wait for ever"
    assert all(0 <= part.start < part.stop <= sizes[part.batch] for hand in hands for part in hand)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_no_rank_is_idle_where_examples_can_be_shared_out(batches: int, each: int, count: int) -> None:
    hands = deal([each * count] * batches, count)
    assert not any(part.idle for hand in hands for part in hand)
    assert len({sum(part.stop - part.start for part in hand) for hand in hands}) == 1


def test_batches_stay_whole_where_that_is_even() -> None:
    assert [[(part.batch, part.start, part.stop) for part in hand] for hand in deal([3, 3, 3, 3], 2)] == [
        [(0, 0, 3), (2, 0, 3)],
        [(1, 0, 3), (3, 0, 3)],
    ]


# ---- what two processes get to, and one by their side


class Team:
    """Two processes of `rank_program`, whose folder has what they found and then their socket."""

    def __init__(self, folder: Path, fault: str = "") -> None:
        options = ["--client=0", "--share", "model=builtin:tiny-llama", f"data={data()}", "num_threads=1"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"FERRET_TEST_FAULT": fault} if fault else {}
        command = [sys.executable, *launch, str(PROGRAM), str(folder), "cpu", *options]
        self.folder, self.path, self._log = folder, folder / "party" / "socket", folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, path: Path) -> None:
        limit = time.monotonic() + LONG
        while not path.exists():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < limit, self.said
            time.sleep(0.05)

    def found(self) -> list[dict[str, Any]]:
        self.wait_for(self.path)
        return [json.loads((self.folder / f"rank-{rank}.json").read_text()) for rank in range(2)]

    def ask(self, call: Frame) -> Frame:
        self.wait_for(self.path)
        return ask(self.path, call, LONG)

    def ranks(self) -> list[int]:
        """The ids of the two processes."""
        parent = self.process.pid
        return [int(n) for n in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@contextmanager
def team_in(folder: Path, fault: str = "") -> Iterator[Team]:
    team = Team(folder, fault)
    try:
        yield team
    finally:
        team.process.terminate()
        team.process.wait(LONG)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team_in(tmp_path_factory.mktemp("team")) as running:
        yield running


def test_they_train_as_one_process_does(team: Team) -> None:
    """With SGD, momentum and Adam, kept or not, clipped, checkpointed, in parts of batches."""
    mine, theirs = team.found()
    names = [name for name in mine if name.startswith("training")]
    assert len(names) == 8
    for name in names:
        whole, cut = mine[name]["losses"]
        loose = "bfloat16" in name
        assert cut == pytest.approx(whole, rel=1e-3 if loose else 1e-6), name
        assert mine[name]["error"] < (0.02 if loose else 2e-6), name
        assert mine[name]["losses"] == theirs[name]["losses"], name


def test_they_find_together_that_training_diverges(team: Team) -> None:
    for found in team.found():
        assert "training diverged" in found["divergence"]["said"]
        whole, cut = found["divergence"]["losses"]
        assert cut == pytest.approx(whole, rel=1e-6), "it goes on with what is left of the step that diverged"


def test_their_coordinates_are_the_whole_models(team: Team) -> None:
    """To float32's rounding where shards are cut at tiles, else to that of the tiles."""
    mine, theirs = team.found()
    for name, bound in (("in whole tiles", 2e-7), ("tiles are cut, and rank 1 lacks a parameter", 1e-6)):
        one, two = mine[f"projection: {name}"], theirs[f"projection: {name}"]
        assert one["error"] < bound, name
        assert one["gammas"] == two["gammas"], name
        assert one["same bits"], name
        assert one["same digests"], name
        assert two["same digests"], name
    assert two["empty"] == 0


def test_rounds_end_with_the_servers_weights_on_every_rank(team: Team) -> None:
    mine, theirs = team.found()
    names = [name for name in mine if name.startswith("rounds")]
    assert len(names) == 5
    for name in names:
        assert mine[name]["payloads"] == theirs[name]["payloads"], name
        assert max(mine[name]["errors"]) < 1e-6, name
        assert len({*mine[name]["weights"], *theirs[name]["weights"]}) == 1, name


def test_rounds_at_their_socket(team: Team) -> None:
    """The worker's answers are those of one process, and an error that all come to ends nothing."""
    server, alone = Server("training.per_device_train_batch_size=2", "ferret.coordinates=float32"), worker(0)
    for round_ in range(3):
        answer = team.ask(server.call(since=round_))
        expected = alone.answer(server.call(since=round_))
        assert answer["kind"] == "reply", answer
        assert answer["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
        server.take(answer)
    assert team.ask(server.call(since=3, client=1))["type"] == "CallError"
    assert team.ask(server.call(since=3, broadcasts=[b"FRET"]))["type"] == "WireError"
    assert team.ask({"kind": "hello"})["seen"] == 0
    server.take(team.ask(server.call()))
    assert team.ask({"kind": "hello"})["seen"] == 4
    fedavg = Server("algorithm=fedavg")
    assert "algorithm: expected ferret with several processes" in str(team.ask(fedavg.call())["text"])


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_an_answer_and_the_end(tmp_path: Path) -> None:
    """The other one waits for it in a collective, and would for half an hour."""
    with team_in(tmp_path, fault="1") as team:
        answer = team.ask(Server().call())
        assert (answer["kind"], answer["type"]) == ("error", "RankError")
        assert "rank 1: error: OutOfMemoryError: CUDA out of memory" in str(answer["text"])
        assert team.process.wait(LONG) != 0


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_others_with_it(tmp_path: Path) -> None:
    with team_in(tmp_path, fault="none") as team:
        server = Server()
        server.take(team.ask(server.call()))
        os.kill(team.ranks()[1], signal.SIGKILL)
        with pytest.raises((OSError, AssertionError, FrameError)):
            ask(team.path, server.call(since=1), LONG)
        assert team.process.wait(LONG) != 0


@pytest.mark.parametrize(
    ("device", "count"),
    [
        pytest.param("cpu", 3, marks=pytest.mark.slow),
        *(pytest.param("cuda", count, marks=pytest.mark.cuda) for count in range(1, 9)),
    ],
)
def test_other_numbers_of_processes_do_so_too(device: str, count: int, tmp_path: Path) -> None:
    """Of three, none has as many rows as another; GPUs reduce by NCCL."""
    if device == "cuda" and count > torch.cuda.device_count():
        pytest.skip(f"{torch.cuda.device_count()} GPUs are visible to torch")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *launch, PROGRAM, tmp_path, device], check=True, env=environment)
    each = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(count)]
    for name, said in each[0].items():
        kind = name.partition(":")[0]
        if kind == "training":
            assert said["error"] < (0.02 if "bfloat16" in name else 1e-4), name
        elif kind == "projection":
            assert said["error"] < 1e-6, name
            assert said["same bits"], name
            assert said["same digests"], name
        elif kind == "rounds":
            assert max(said["errors"]) < 1e-6, name
            assert len({weights for found in each for weights in found[name]["weights"]}) == 1, name


# ---- who follows whom, without processes


class Fake:
    """A worker that answers as it is told to. kind: of its answers; "stuck" for none."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = iter(kinds)
        self.heard: list[Any] = []

    def greet(self) -> Frame:
        return calls.hello(0, bytes(8), 0)

    def answer(self, frame: Any) -> Frame:
        self.heard.append(dict(frame))
        kind = next(self._kinds)
        if kind == "stuck":
            threading.Event().wait(LONG)
        return (
            calls.error("MemoryError", "none left") if kind == "error" else {"kind": "reply", "payload": kind}
        )


class Memory:
    """A store in Python: a thread that looks into one of torch's as the tests end takes the process down."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, name: str, value: str | bytes) -> None:
        self._values[name] = value.encode() if isinstance(value, str) else value

    def get(self, name: str) -> bytes:
        return self._values[name]

    def check(self, names: list[str]) -> bool:
        return all(name in self._values for name in names)

    def delete_key(self, name: str) -> bool:
        return self._values.pop(name, None) is not None


class Play:
    """A leader and a follower in threads, who meet in a store of this process."""

    def __init__(self, leader: Fake, follower: Fake) -> None:
        store: Any = Memory()
        one, two = (Ranks(rank, 2, torch.device("cpu"), store, None) for rank in range(2))  # type: ignore[arg-type]
        self.ended, self.store = threading.Event(), store
        self.leader = Leader(leader, one, 0.2, lambda status: self.ended.set())
        threading.Thread(target=follow, args=(follower, two), daemon=True).start()

    def ask(self, call: Frame) -> Frame:
        answers: list[Frame] = []
        came = threading.Event()

        def answered(answer: Frame) -> None:
            answers.append(answer)
            came.set()

        threading.Thread(target=self.leader.attend, args=(call, answered), daemon=True).start()
        assert came.wait(LONG)
        return answers[0]


def test_a_call_is_done_by_all_and_answered_once() -> None:
    one, two = Fake("a", "error", "b"), Fake("a", "error", "b")
    play = Play(one, two)
    long = {"kind": "train", "broadcasts": [bytes(3 * ranks.PIECE), b"1"]}
    assert play.ask(long)["payload"] == "a"
    assert play.ask({"kind": "train", "round": 2})["type"] == "MemoryError"
    assert play.ask({"kind": "train", "round": 3})["payload"] == "b"
    assert one.heard == two.heard
    assert two.heard[0] == long
    assert not play.ended.is_set()


@pytest.mark.parametrize(
    ("leader", "follower", "text"),
    [
        ("a", "error", "rank 1: error: MemoryError: none left"),
        ("error", "a", "rank 0: error: MemoryError: none left"),
        ("a", "b", "ranks differ: [0-9a-f]{64}, [0-9a-f]{64}"),
        ("stuck", "error", "rank 1: error: MemoryError: none left"),
        ("error", "stuck", "rank 0: error: MemoryError: none left"),
    ],
)
def test_ranks_that_are_not_of_one_mind_end(leader: str, follower: str, text: str) -> None:
    play = Play(Fake(leader), Fake(follower))
    answer = play.ask({"kind": "train"})
    assert answer["type"] == "RankError"
    assert re.match(f"{text}; all processes of this client end", str(answer["text"]))
    assert play.ended.wait(LONG)


# ---- settings and devices


@pytest.mark.parametrize(
    "setting", ["algorithm=fedzo", "adapter.type=lora", "training.torch_compile=true", "algorithm=fedavg"]
)
def test_what_several_processes_cannot_do_is_refused(setting: str) -> None:
    key, _, value = setting.partition("=")
    config = configuration.build([("model", "m"), ("data", "d"), ("out", "o"), (key, value)])
    with pytest.raises(ConfigError, match=f"{key}: expected .* with several processes a client, got"):
        sharded.check(adapters.resolve(config))


def test_parameters_of_several_dtypes_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    with pytest.raises(ConfigError, match=r"dtype: expected one of all parameters .*, got bfloat16, float32"):
        sharded.cut(model, None)  # type: ignore[arg-type]


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(own_device("auto", place, 4)) for place in range(4)] == [f"cuda:{n}" for n in range(4)]
    assert own_device("cpu", 3, 9).type == "cpu"
    with pytest.raises(ConfigError, match="device: expected 5 visible GPUs, one a process, got 4"):
        own_device("cuda", 0, 5)
    with pytest.raises(ConfigError, match=r"device: expected auto, cpu or cuda .*, got cuda:1"):
        own_device("cuda:1", 0, 2)


def test_join_starts_them_by_torchrun() -> None:
    given = ["here:9092", "--clients", "3", "--nproc-per-node", "2", "model=m", "data=d", "device=cpu"]
    command = deploy._worker_command(deploy.join_parser().parse_intermixed_args(given), 3, Path("socket"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "ferret_ext.federated", "worker", "socket", "--client", "3", *given[-3:]]
    assert command == [sys.executable, *launch, *worker]
    alone = deploy._worker_command(deploy.join_parser().parse_intermixed_args(given[:3]), 3, Path("socket"))
    assert alone == [sys.executable, *worker[:6]]


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_join_wants_a_process_or_more(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deploy.join_parser().parse_args(["here:9092", "--clients", "0", "--nproc-per-node", count])
    assert "--nproc-per-node" in capsys.readouterr().err
