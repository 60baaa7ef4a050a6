"""A federation over real sockets: Flower's server and two of its clients, all on this machine.

    python python_examples/05_flower.py

Needs `pip install '.[flower]'`, and takes most of a minute: many processes start. `ferret serve` and `ferret
join` are all there is to it (docs/deployment.md); the same run in one process then gives the same bits.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

MODEL, DATA = "builtin:tiny-llama", "builtin:alpaca"
FERRET = (sys.executable, "-m", "ferret_ext.federated")
ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1"}  # not the source tree that we may be in
RUN = (
    *("--preset=demo", "rounds=2", "num_clients=2", "training.max_steps=4", "ferret.K=1024"),
    "evaluation.max_samples=20",
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder), Path(folder, "log")
        with log.open("wb") as file:
            federate(out / "flower", file)
            ferret(file, "simulate", *RUN, f"--out={out}/alone")
        show(out)


def federate(out: Path, log: IO[bytes]) -> None:
    """A server, and in another process two clients, until the server is done."""
    address = f"127.0.0.1:{free_port()}"
    party = (f"model={MODEL}", f"data={DATA}", "num_threads=1")
    join = (*FERRET, "join", address, "--clients=0,1", "--share", *party)
    with subprocess.Popen(join, stdout=log, stderr=log, env=ENVIRONMENT) as clients:
        try:
            ferret(log, "serve", f"--listen={address}", *RUN, f"--out={out}")
        finally:
            clients.terminate()


def ferret(log: IO[bytes], *arguments: str) -> None:
    if subprocess.run([*FERRET, *arguments], stdout=log, stderr=log, env=ENVIRONMENT).returncode:
        raise SystemExit(f"ferret {arguments[0]} failed:\n{Path(log.name).read_text()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def show(out: Path) -> None:
    for line in (out / "flower" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        sent = f"{row['payload_bytes_up']:,} bytes up, {row['payload_bytes_down']:,} down"
        print(f"round {row['round']}: evaluation loss {row['eval_loss']:.4f}, {sent}")
    for name in ("ledger", "model/model.safetensors"):
        same = (out / "flower" / name).read_bytes() == (out / "alone" / name).read_bytes()
        print(f"{Path(name).name}: {'the same bits as' if same else 'not as'} in one process")


if __name__ == "__main__":
    main()
