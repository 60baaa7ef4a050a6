"""Rounds a minute and memory of a simulation with many clients: Flower's, and the one in one process.

    python benchmarks/simulate_many.py [--clients 1000] [--chosen 50] [--rounds 20] [--json FILE]

Runs the tiny model of the demo twice with the same settings: by `ferret flower-init --simulation` and
`flwr run` on a SuperLink of its own (flwr 1.41 or later with its extra `simulation`), one process of Ray's a
core; and by `ferret simulate` on one core. Both must come to the same weights by the same updates.

Rounds are counted from the end of the first on, which loads models and data, and so are seconds of all cores
together: they tell what a round takes where others use the machine too. Memory is the sum over all processes
of their proportional set sizes (PSS), so that what they share counts once, and the most of it that was seen.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timer import write

from ferret_ext.federated import ledger
from ferret_ext.federated.engines.flower import processes

MARK = "FERRET_MANY"  # the environment variable by which a run's processes are known
SETTINGS = [
    *("--preset", "demo", "training.max_steps=2", "training.gradient_accumulation_steps=1"),
    *("ferret.K=512", "ferret.coordinates=auto", "evaluation.max_samples=50", "federation.poll=0.05"),
]
KINDS = {  # what stands in a command line, and what such a process is; the first that fits
    "ray::ClientAppActor": "clients",
    "flwr-simulation": "server",
    "ferret_ext.federated\0simulate": "server and clients",
    "ray": "Ray",
    "raylet": "Ray",
}


def processes_of(mark: str) -> Iterator[tuple[str, int, float]]:
    """Kind, proportional set size in bytes and seconds of a core of each living process of a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            line = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
            sizes = (folder / "smaps_rollup").read_text().splitlines()
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:  # it has ended
            continue
        kind = next((kind for text, kind in KINDS.items() if text in line), "Flower")
        size = next((int(row.split()[1]) * 1024 for row in sizes if row.startswith("Pss:")), 0)
        yield kind, size, sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def watch(running: subprocess.Popen[bytes], metrics: Path, rounds: int, mark: str) -> dict[str, Any]:
    """Looks on until the run ends: when rounds ended, and the largest sum of memory with its parts."""
    begun, ends, busy, peak = time.monotonic(), [0.0] * 0, [0.0] * 0, dict[str, int]()
    while running.poll() is None:
        done = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0  # the first is round 0
        living = list(processes_of(mark))
        busy += [sum(seconds for *_, seconds in living)] * (done - len(ends))
        ends += [time.monotonic() - begun] * (done - len(ends))
        sizes: dict[str, int] = {}
        for kind, size, _ in living:
            sizes[kind] = sizes.get(kind, 0) + size
        peak = max(peak, sizes, key=lambda parts: sum(parts.values()))
        time.sleep(0.2)
    if running.returncode or len(ends) < rounds:
        raise SystemExit(f"expected {rounds} rounds, got {len(ends)} and exit status {running.returncode}")
    return {
        "seconds_of_start_and_round_1": ends[0],
        "rounds_a_minute": 60 * (rounds - 1) / (ends[-1] - ends[0]),
        "core_seconds_a_round": (busy[-1] - busy[0]) / (rounds - 1),
        "peak_memory_bytes": sum(peak.values()),
        "memory_bytes": peak,
    }


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def flower(folder: Path, settings: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """In Flower's simulation."""
    mark, port = uuid.uuid4().hex, processes.free_port()
    home = folder / "home"
    home.mkdir()
    processes.write_connection(home, f"127.0.0.1:{port}", processes.Security())
    environment = {**processes.environment(home), MARK: mark, "OMP_NUM_THREADS": "1"}
    environment["RAY_worker_niceness"] = "0"  # else its processes stand back behind whatever runs beside
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    app = [sys.executable, "-m", "ferret_ext.federated", "flower-init", str(folder / "app"), "--simulation"]
    subprocess.run([*app, "--out", str(folder / "flower"), *settings], env=environment, check=True)
    link = [*processes.program("flower-superlink"), "--insecure", "--simulation"]
    link += ["--host", "127.0.0.1", "--port", str(port)]
    run = [*processes.program("flwr"), "run", str(folder / "app"), processes.CONNECTION, "--stream"]
    run += ["--federation-config", f"num-supernodes={options.clients} client-resources-num-cpus=1"]
    with started(link, environment, folder / "superlink.log") as process:
        processes.wait_for(f"127.0.0.1:{port}", process)
        with started(run, environment, folder / "flower.log") as running:
            return watch(running, folder / "flower" / "metrics.jsonl", options.rounds, mark)


def alone(folder: Path, settings: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """In one process."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "ferret_ext.federated", "simulate", "--out", str(folder / "alone")]
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    with started([*command, *settings], environment, folder / "alone.log") as running:
        return watch(running, folder / "alone" / "metrics.jsonl", options.rounds, mark)


def outcome(folder: Path) -> list[tuple[bytes, object]]:
    """The weights after each round, and the updates that led to them."""
    return [(record.weights, record.values.get("updates")) for record in ledger.read(folder / "ledger")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--chosen", type=int, default=50, help="clients a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    many = [f"num_clients={options.clients}", f"client_fraction={options.chosen / options.clients}"]
    settings = [*SETTINGS, *many, f"rounds={options.rounds}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder, before = Path(temporary), os.getloadavg()
        rows = [{"what": run.__name__, **run(folder, settings, options)} for run in (flower, alone)]
        outcomes = [outcome(folder / name) for name in ("flower", "alone")]
    if outcomes[0] != outcomes[1]:
        raise SystemExit("the two runs differ")
    for row in rows:
        print(f"{row['what']:8} {row['rounds_a_minute']:6.1f} rounds a minute, ", end="")
        print(f"{row['core_seconds_a_round']:.1f} s of a core a round, ", end="")
        print(f"{row['seconds_of_start_and_round_1']:.0f} s to the end of round 1, ", end="")
        print(f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB: ", end="")
        print(", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in row["memory_bytes"].items()))
    if options.json is not None:
        facts = {"clients": options.clients, "chosen": options.chosen, "rounds": options.rounds}
        load = {"load_before": before[0], "load_after": os.getloadavg()[0]}
        packages = {name: version(name) for name in ("flwr", "ray")}
        write(options.json, rows, **facts, **load, **packages, settings=SETTINGS)


if __name__ == "__main__":
    main()
