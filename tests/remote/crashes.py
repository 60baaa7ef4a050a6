"""Federations whose processes are killed at random moments, compared with the run in one process.

    python tests/remote/crashes.py [--runs N] [--seed S]

Each run is a real federation on loopback with two clients, both of which every round needs. At random
moments a process is killed (SIGKILL): a worker, a ClientApp, a SuperNode, the ServerApp, the SuperLink, or
ferret serve and with it the last two. A server that has ended is resumed. In the end the updates that counted
and the weights after every round must be those of the run in one process. Prints a summary as JSON.
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
import uuid
from collections import Counter
from pathlib import Path

from parties import MODEL, RUN, data, in_process, play, settings

from ferret_ext.federated import ledger
from ferret_ext.federated.engines.flower.processes import free_port

MARK = "FERRET_CRASHES"  # the environment variable by which a federation's processes are known
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
LIMIT = 420.0  # seconds for a run
QUIET = 6.0  # seconds between two deaths, on average


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


def start(mark: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "ferret_ext.federated", *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def kill_one(mark: str, draw: random.Random) -> str | None:
    """Kills a process of a random kind; which kind, if there was one."""
    kind = draw.choice(list(KINDS))
    living = processes(mark)[kind]
    if not living:
        return None
    try:
        os.kill(draw.choice(living), signal.SIGKILL)
    except ProcessLookupError:
        return None
    return kind


def federate(folder: Path, deaths: int, draw: random.Random) -> Counter[str]:
    """One federation to its end, with so many deaths unless it ends before; what was killed."""
    mark, port, out = uuid.uuid4().hex, free_port(), folder / "run"
    own = [f"model={MODEL}", f"data={data()}", "num_threads=1"]
    run = [
        f"--model={MODEL}",
        f"--data={data()}",
        f"--out={out}",
        "--resume",
        f"--listen=127.0.0.1:{port}",
        *SETTINGS,
    ]
    killed: Counter[str] = Counter()
    join = start(
        mark,
        folder / "join.log",
        "join",
        f"127.0.0.1:{port}",
        "--clients=0,1",
        "--share",
        f"--logs={folder}",
        *own,
    )
    limit, next_death = time.monotonic() + LIMIT, time.monotonic() + draw.uniform(4, 20)
    try:
        while not (out / "run.json").exists():
            server = start(mark, folder / "serve.log", "serve", *run)
            while server.poll() is None:
                if time.monotonic() > limit:
                    raise SystemExit(f"not finished within {LIMIT:g} s: {folder}")
                if killed.total() < deaths and time.monotonic() > next_death:
                    if kind := kill_one(mark, draw):
                        killed[kind] += 1
                    next_death = time.monotonic() + draw.expovariate(1 / QUIET)
                time.sleep(0.05)
            killed["ends of the server"] += 1
            time.sleep(2)  # for what it had started to be gone
    finally:
        join.terminate()
        join.wait(60)
        for living in processes(mark).values():
            for process in living:
                os.kill(process, signal.SIGKILL)
    return killed


def outcome(folder: Path) -> list[tuple[bytes, object]]:
    """The weights after each round, and the updates that led to them."""
    return [(record.weights, record.values.get("updates")) for record in ledger.read(folder / "ledger")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--deaths", type=int, default=4, help="a run, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the logs; default a temporary one")
    options = parser.parse_args()
    draw, counts, begun = random.Random(options.seed), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        base = options.keep or Path(temporary)
        play(settings(base / "alone", *SETTINGS[len(RUN) :]), None, in_process)  # type: ignore[arg-type]
        expected = outcome(base / "alone")
        for number in range(options.runs):
            folder = base / str(number)
            folder.mkdir(parents=True)
            counts += federate(folder, options.deaths, draw)
            if outcome(folder / "run") != expected:
                raise SystemExit(f"run {number} differs from the one in one process: {folder}")
            print(f"run {number}: {dict(counts)}", flush=True)
    print(json.dumps({"runs": options.runs, **counts, "seconds": round(time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
