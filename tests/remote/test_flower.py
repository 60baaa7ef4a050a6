"""A federation for real: Flower's SuperLink and two SuperNodes, all their processes, sockets on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from parties import MODEL, RUN, data, in_process, play, settings, told

from ferret_ext.federated import ledger

pytest.importorskip("flwr", reason="flwr is not installed (pip install '.[flower]')")
pytestmark = pytest.mark.flower

ROOT = Path(__file__).parents[2]
FAST = ["num_clients=2", "client_fraction=1", "rounds=2", "federation.join_timeout=100"]
FAST += ["federation.min_deadline=200"]  # on a busy machine nobody is left out
SECONDS = 600  # for a federation to end, on a busy machine


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def ferret(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process, which is told to end in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ferret_ext.federated", *arguments]
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def serve(out: Path, port: int, *more: str) -> tuple[str, ...]:
    run = [f"--model={MODEL}", f"--data={data()}", f"--out={out}", *RUN, *FAST]
    return ("serve", f"--listen=127.0.0.1:{port}", f"--superlink-log={out}.link", *run, *more)


def join(port: int, logs: Path, *more: str) -> tuple[str, ...]:
    own = [f"model={MODEL}", f"data={data()}", "num_threads=1"]
    return ("join", f"127.0.0.1:{port}", "--clients=0,1", "--share", f"--logs={logs}", *more, *own)


def said(folder: Path) -> str:
    """All logs, for a failing test's message."""
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(folder.rglob("*.lo*")))


def wait(process: subprocess.Popen[bytes], folder: Path, seconds: float = SECONDS) -> None:
    try:
        assert process.wait(seconds) == 0, said(folder)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not finished within {seconds} s\n{said(folder)}")


def wait_until(path: Path, lines: int, folder: Path) -> None:
    limit = time.monotonic() + SECONDS
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < limit, said(folder)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    play(settings(out, *FAST), None, in_process)  # type: ignore[arg-type]
    return out


def assert_same(out: Path, alone: Path, names: Sequence[str] = ("ledger", "ledger.head")) -> None:
    """The ledger holds the digests of the weights after every round."""
    for name in names:
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    assert told(out) == told(alone)


def test_a_federation_has_the_bits_of_a_run_in_process(tmp_path: Path, alone: Path) -> None:
    port, out = free_port(), tmp_path / "run"
    with (
        ferret(tmp_path / "join.log", *join(port, tmp_path)),
        ferret(tmp_path / "serve.log", *serve(out, port)) as server,
    ):
        wait(server, tmp_path)
    assert_same(out, alone)
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_with_the_parties_that_wait(tmp_path: Path, alone: Path) -> None:
    """SIGKILL to ferret serve, whose SuperLink and ServerApp end with it."""
    port, out = free_port(), tmp_path / "run"
    with ferret(tmp_path / "join.log", *join(port, tmp_path)):
        with ferret(tmp_path / "first.log", *serve(out, port)) as server:
            wait_until(out / "metrics.jsonl", 2, tmp_path)
            server.send_signal(signal.SIGKILL)
        time.sleep(2)
        with ferret(tmp_path / "second.log", *serve(out, port, "--resume")) as server:
            wait(server, tmp_path)
    records = [list(ledger.read(folder / "ledger")) for folder in (out, alone)]
    assert len(records[0]) == 3
    for mine, other in zip(*records, strict=True):
        assert mine.weights == other.weights
        assert mine.values.get("updates") == other.values.get("updates")


# ---- TLS and keys of nodes ----


def shell(folder: Path, *commands: str) -> None:
    for command in commands:
        subprocess.run(
            command, executable="/bin/bash", shell=True, cwd=folder, check=True, capture_output=True
        )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of docs/deployment.md: a certificate for the server, and a key for each of three nodes."""
    folder = tmp_path_factory.mktemp("keys")
    page = (ROOT / "docs" / "deployment.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith(("openssl ", "ssh-keygen "))]
    assert len(lines) == 5, "the page makes a certificate in three commands and keys in two"
    for program in ("openssl", "ssh-keygen"):
        if not any(Path(place, program).exists() for place in os.environ["PATH"].split(os.pathsep)):
            pytest.skip(f"{program} is not installed")
    shell(folder, *lines)
    shell(folder, "ssh-keygen -q -t ecdsa -b 384 -N '' -f wrong.key")
    shell(folder, lines[0].replace("ca.", "wrong-ca."))
    return folder


def test_a_node_with_a_wrong_key_is_refused_and_the_others_finish(
    tmp_path: Path, keys: Path, alone: Path
) -> None:
    """Clients 0 and 1 have their keys; somebody else claims to be client 1, encrypted and all."""
    port, out = free_port(), tmp_path / "run"
    tls = [f"--ssl-certfile={keys}/server.pem", f"--ssl-keyfile={keys}/server.key"]
    tls += [f"--ssl-ca-certfile={keys}/ca.pem"]
    allowed = [f"--supernode-key={keys}/{name}.key.pub" for name in ("a", "b")]
    trust = f"--root-certificates={keys}/ca.pem"
    own = [f"--auth-supernode-private-key={keys}/{name}.key" for name in ("a", "b")]
    wrong = [*join(port, tmp_path / "wrong", trust, f"--auth-supernode-private-key={keys}/wrong.key")]
    wrong[wrong.index("--clients=0,1")] = "--clients=1"
    (tmp_path / "wrong").mkdir()
    with (
        ferret(tmp_path / "serve.log", *serve(out, port, *tls, *allowed)) as server,
        ferret(tmp_path / "wrong" / "join.log", *wrong),
    ):
        wait_for_text(tmp_path / "wrong" / "join.log", "SuperNode ended and is started again", tmp_path)
        with ferret(tmp_path / "join.log", *join(port, tmp_path, trust, *own)):
            wait(server, tmp_path)
    assert_same(out, alone)
    assert "loads" in (tmp_path / "join.log").read_text()
    assert "loads" not in (tmp_path / "wrong" / "join.log").read_text(), "a worker that is never asked"
    assert "SuperNode ended" not in (tmp_path / "join.log").read_text(), "the same connection with right keys"


@pytest.mark.slow
def test_a_node_does_not_speak_to_a_server_of_another_authority(tmp_path: Path, keys: Path) -> None:
    port = free_port()
    tls = [f"--ssl-certfile={keys}/server.pem", f"--ssl-keyfile={keys}/server.key"]
    tls += [f"--ssl-ca-certfile={keys}/ca.pem", f"--supernode-key={keys}/a.key.pub"]
    own = [f"--root-certificates={keys}/wrong-ca.pem", f"--auth-supernode-private-key={keys}/a.key"]
    with (
        ferret(tmp_path / "serve.log", *serve(tmp_path / "run", port, *tls)),
        ferret(tmp_path / "join.log", *join(port, tmp_path, *own, "--clients=0")),
    ):
        wait_for_text(tmp_path / "join.log", "CERTIFICATE_VERIFY_FAILED", tmp_path)
        assert "loads" not in (tmp_path / "join.log").read_text(), "a worker that is never asked"


# ---- masks ----


@pytest.mark.slow
def test_a_masked_federation_has_the_weights_of_a_run_in_process(tmp_path: Path) -> None:
    """Its updates are other bytes each time, and it asks for no share that it can do without. The weights are
    those of its ledger."""
    masked = [*FAST, "ferret.seeds=shared-round", "ferret.secure_aggregation=true", "num_clients=3"]
    alone, port, out = tmp_path / "alone", free_port(), tmp_path / "run"
    play(settings(alone, *masked), None, in_process)  # type: ignore[arg-type]
    with (
        ferret(tmp_path / "join.log", *join(port, tmp_path, "--clients=0,1,2")),
        ferret(tmp_path / "serve.log", *serve(out, port, *masked)) as server,
    ):
        wait(server, tmp_path)
    mine, others = ([record.weights for record in ledger.read(f / "ledger")] for f in (out, alone))
    assert mine == others
    assert len(mine) == 3
    assert [row["clients"] for row in told(out)] == [[], [0, 1, 2], [0, 1, 2]]


def wait_for_text(path: Path, text: str, folder: Path) -> None:
    limit = time.monotonic() + SECONDS
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < limit, said(folder)
        time.sleep(0.2)
