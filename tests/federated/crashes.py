"""Runs that die anywhere and go on, compared with one that was let alone.

    python tests/federated/crashes.py [--boundaries N] [--moments N] [--seed S]

A run of a small regression writes its journal and metrics into a folder. It is killed (SIGKILL) before, in
the middle of and after the things it does to files, and at random moments; then it goes on, may be killed
again, and in the end its weights, metrics and ledger must be those of the run that was let alone. Prints a
summary as JSON.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from federation import toy, train
from toy import examples

from ferret_ext.federated import digests, snapshots
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.client import OptimizerStates
from ferret_ext.federated.config import FerretConfig, LedgerConfig, SimulationConfig
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation, Sample
from ferret_ext.federated.journal import Genesis
from ferret_ext.federated.metrics import RoundMetrics, Stopwatch
from ferret_ext.federated.report import RunFolder
from ferret_ext.federated.rounds import Deaf, run_rounds
from ferret_ext.federated.server import Server

ROUNDS = 7
MEMORY = "/dev/shm"
MAKERS: dict[str, Callable[[Any], Any]] = {
    "ferret": lambda fit: Ferret(FerretConfig(K=40, allocation="norm"), 1.0, fit),
    "ferret-shared-round": lambda fit: SharedFerret(FerretConfig(K=40, allocation="norm"), 1.0, fit, seed=3),
    "fedavg": lambda fit: FedAvg(1.0, fit),
}
State = tuple[bytes, list[dict[str, Any]], bytes, bytes]


class Watcher(Deaf):
    """Keeps metrics in the run's folder; says nothing."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def round_ends(self, metrics: RoundMetrics, samples: Sequence[Sample]) -> None:
        self._folder.append(metrics, samples)


def remembering(states: OptimizerStates, model: Any, data: Any, seed: int, client: int = 0) -> float:
    """Training that depends on what the client kept from its former rounds."""
    loss = train(model, data, seed, steps=1)
    weight = next(model.parameters())
    kept = states.pop(client, {}).get(0, {"momentum": torch.zeros_like(weight)})["momentum"]
    with torch.no_grad():
        weight.add_(kept, alpha=0.1)
    states[client] = {0: {"momentum": 0.9 * kept + weight.detach()}}
    return loss


def evaluate(round_: int, model: Any, watch: Stopwatch) -> Evaluation:
    with torch.no_grad():
        loss = model(torch.ones(1, 9)).square().sum().item()
    sample = Sample(0, "prompt", "reference", f"output {loss}", "eos", {"score": loss})
    return Evaluation(loss, 1, {"score": loss}, [sample])


def play(path: Path, name: str) -> None:
    """The run from where its folder stands to its end, and its weights beside it."""
    torch.set_num_threads(1)
    config = SimulationConfig(
        model="toy", data="toy", out=str(path), ledger=LedgerConfig(snapshot_every=2, keep_snapshots=2)
    )
    folder = RunFolder(config, resume=True)
    states: OptimizerStates = {}
    algorithm = MAKERS[name](partial(remembering, states))
    model = toy()
    genesis = Genesis(digests.of_model(model), name)
    clients = InProcessClients(algorithm, copy.deepcopy(model), [examples(1)] * 5, [1.0] * 5, seed=0)
    server = Server(algorithm, model, range(5), 0.6, 0, run=genesis.run)
    watcher = Watcher(folder)
    journal = folder.open_journal(genesis, states)
    run_rounds(ROUNDS, server, partial(clients.exchange, watcher), evaluate, watcher, 1, journal)
    torch.save([param.detach() for param in model.parameters()], path.with_suffix(".weights"))


def state_of(path: Path) -> State:
    """What must be the same: weights, metrics but for seconds, samples, ledger and its head."""
    weights = b"".join(t.numpy().tobytes() for t in torch.load(path.with_suffix(".weights")))
    lines = [(path / name).read_text().splitlines() for name in ("metrics.jsonl", "samples.jsonl")]
    rows = [json.loads(line) for of_file in lines for line in of_file]
    told = [{key: row[key] for key in row if not key.startswith("seconds_")} for row in rows]
    return weights, told, (path / "ledger").read_bytes(), (path / "ledger.head").read_bytes()


# ---- dying ----


class Boundaries:
    """Counts the moments around everything that is done to files, and dies at the chosen one."""

    def __init__(self, chosen: int) -> None:
        self.left = chosen

    def moment(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.moment()
            result = call(*args, **kwargs)
            self.moment()
            return result

        return wrapped

    def torn_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Saving by safetensors: whole, or half of it and dead."""

        def wrapped(tensors: Any, path: Path) -> None:
            save(tensors, path)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.moment()
            path.write_bytes(whole)

        return self.around(wrapped)

    def torn_open(self, open_: Callable[..., Any]) -> Callable[..., Any]:
        """Files whose writes may get half of their bytes onto the disk, and no more."""

        def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            opened = open_(file, mode, *args, **kwargs)
            if "r" in mode and "+" not in mode:
                return opened
            write, flush = opened.write, opened.flush

            def torn(data: Any) -> int:
                self.moment()
                half = len(data) // 2
                write(data[:half])
                flush()
                self.moment()
                count = half + write(data[half:])
                self.moment()
                return count

            return Torn(opened, torn)

        return wrapped

    def install(self) -> None:
        for name in ("fsync", "replace", "unlink", "mkdir"):
            setattr(os, name, self.around(getattr(os, name)))
        snapshots.save_file = self.torn_save(snapshots.save_file)
        io.open = self.torn_open(io.open)  # type: ignore[assignment]


class Torn:
    """A file with another `write`."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self._file = file
        self.write = write

    def writelines(self, lines: Sequence[Any]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for runs, in memory where that is possible: a process that is killed loses no file there."""
    return tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)


def child(
    path: Path, name: str, boundary: int = 0, delay: float | None = None, count: Path | None = None
) -> str:
    """Plays the run in a process of its own, which may be killed: "killed" or "finished".

    count: a file for the number of its boundaries.
    """
    process = os.fork()
    if process == 0:
        try:
            boundaries = Boundaries(boundary)
            if boundary or count:
                boundaries.install()
            play(path, name)
            if count:
                count.write_text(str(-boundaries.left))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{name}: a run failed, killed at boundary {boundary} or after {delay} seconds")
    return "killed" if status else "finished"


def crash_and_resume(name: str, deaths: Sequence[dict[str, Any]], expected: State) -> int:
    """Plays one run that dies so and is resumed, until it is finished; how often it was killed."""
    with scratch() as temporary:
        path = Path(temporary) / "run"
        killed = sum(child(path, name, **death) == "killed" for death in deaths)
        child(path, name)
        if state_of(path) != expected:
            raise SystemExit(f"{name}: a run killed by {deaths} differs from the one that was let alone")
    return killed


def at_boundaries(name: str, count: int | None, draw: random.Random, expected: State) -> Counter[str]:
    """Kills runs at so many boundaries, or all of them, and every third once more after it was resumed."""
    total = count_boundaries(name)
    chosen = range(1, total + 1) if count is None else draw.sample(range(1, total + 1), min(count, total))
    killed = 0
    for number, boundary in enumerate(chosen):
        deaths = [
            {"boundary": boundary},
            *([{"boundary": draw.randint(1, total)}] if number % 3 == 0 else []),
        ]
        killed += crash_and_resume(name, deaths, expected)
    return Counter({f"boundaries of {name}": total, "killed at boundaries": killed})


def at_moments(name: str, count: int, draw: random.Random, seconds: float, expected: State) -> Counter[str]:
    """Kills runs at random moments of their `seconds`, one to four times each, until it was so often."""
    killed = 0
    while killed < count:
        deaths = [{"delay": draw.uniform(0, seconds)} for _ in range(draw.randint(1, 4))]
        killed += crash_and_resume(name, deaths, expected)
    return Counter({"killed at random moments": killed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--boundaries", type=int, help="for each algorithm; by default all")
    parser.add_argument("--moments", type=int, default=100, help="for each algorithm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    counts: Counter[str] = Counter()
    for name in MAKERS:
        with scratch() as temporary:
            start = time.perf_counter()
            child(Path(temporary) / "alone", name)
            seconds = time.perf_counter() - start
            expected = state_of(Path(temporary) / "alone")
        counts += at_boundaries(name, options.boundaries, draw, expected)
        counts += at_moments(name, options.moments, draw, seconds, expected)
    print(json.dumps(counts))


def count_boundaries(name: str) -> int:
    """How many moments a run that is let alone has."""
    with scratch() as temporary:
        count = Path(temporary) / "count"
        child(Path(temporary) / "run", name, count=count)
        return int(count.read_text())


if __name__ == "__main__":
    main()
