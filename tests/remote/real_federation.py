"""A federation of real processes on this machine, for scripts that do to it whatever may happen to one.

Both clients are needed in every round. So in the end the updates that counted, and the weights after every
round, must be those of the run in one process, whatever happened on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parties import MODEL, RUN, data, in_process, play, settings

from ferret_ext.federated import ledger

MARK = "FERRET_FEDERATION"  # the environment variable by which a federation's processes are known
KINDS = {  # what stands in a process's command line
    "worker": "ferret_ext.federated\0worker",
    "ClientApp": "flwr-clientapp",
    "SuperNode": "flower-supernode",
    "ServerApp": "flwr-serverapp",
    "SuperLink": "flower-superlink",
    "ferret serve": "ferret_ext.federated\0serve",
}
SETTINGS = [
    *RUN,
    *("num_clients=2", "client_fraction=1", "rounds=4", "robust.quorum=2", "training.max_steps=4"),
    *("federation.min_deadline=8", "federation.deadline_factor=2", "federation.max_deadline=300"),
]
LIMIT = 1200.0  # seconds for a run, on a busy machine

Outcome = list[tuple[bytes, object]]


@dataclass(frozen=True)
class Site:
    """Where clients are. server: HOST:PORT as it is reached from there. inside: what commands begin with."""

    clients: str
    server: str
    inside: tuple[str, ...] = ()


def run_to_end(
    folder: Path,
    mark: str,
    sites: Sequence[Site],
    listen: str,
    disturb: Callable[[], object],
    inside: tuple[str, ...] = (),
) -> int:
    """One federation to its end; how often its server was started. disturb: is called again and again."""
    out = folder / "run"
    run = ["serve", f"--model={MODEL}", f"--data={data()}", f"--out={out}", "--resume", f"--listen={listen}"]
    own = ["--share", f"--logs={folder}", f"model={MODEL}", f"data={data()}", "num_threads=1"]
    joins = [
        start(
            mark,
            folder / f"join-{n}.log",
            site.inside,
            "join",
            site.server,
            f"--clients={site.clients}",
            *own,
        )
        for n, site in enumerate(sites)
    ]
    starts, limit = 0, time.monotonic() + LIMIT
    try:
        while not (out / "run.json").exists():
            server, starts = start(mark, folder / "serve.log", inside, *run, *SETTINGS), starts + 1
            while server.poll() is None:
                if time.monotonic() > limit:
                    raise SystemExit(f"not finished within {LIMIT:g} s: {folder}")
                disturb()
                time.sleep(0.05)
            time.sleep(2)  # for what it had started to be gone
    finally:
        for join in joins:
            join.terminate()
        for join in joins:
            join.wait(60)
        for living in processes(mark).values():
            for process in living:
                os.kill(process, signal.SIGKILL)
    return starts


def start(mark: str, log: Path, inside: tuple[str, ...], *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    command = [*inside, sys.executable, "-m", "ferret_ext.federated", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def processes(mark: str) -> dict[str, list[int]]:
    """The federation's living processes by their kind."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            line = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        for kind, text in KINDS.items():
            if text in line:
                found[kind].append(int(folder.name))
    return found


def undisturbed(folder: Path) -> Outcome:
    """What the run in one process comes to."""
    play(settings(folder, *SETTINGS[len(RUN) :]), None, in_process)  # type: ignore[arg-type]
    return outcome(folder)


def outcome(folder: Path) -> Outcome:
    """The weights after each round, and the updates that led to them."""
    return [(record.weights, record.values.get("updates")) for record in ledger.read(folder / "ledger")]


def make_parser(description: str) -> argparse.ArgumentParser:
    """What scripts that repeat federations are told."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the logs; default a temporary one")
    return parser


def repeat(options: argparse.Namespace, federate: Callable[[Path, random.Random], Counter[str]]) -> None:
    """Federations until one ends otherwise than it should. federate: in a folder; what was done to it."""
    draw, counts, begun = random.Random(options.seed), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        base = options.keep or Path(temporary)
        expected = undisturbed(base / "alone")
        for number in range(options.runs):
            folder = base / str(number)
            folder.mkdir(parents=True)
            counts += federate(folder, draw)
            if outcome(folder / "run") != expected:
                raise SystemExit(f"run {number} differs from the one in one process: {folder}")
            print(f"run {number}: {dict(counts)}", flush=True)
    print(json.dumps({"runs": options.runs, **counts, "seconds": round(time.monotonic() - begun)}))
