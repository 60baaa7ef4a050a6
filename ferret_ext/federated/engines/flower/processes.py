"""Flower's processes, for versions whose command lines differ: 1.41 has one port where 1.29 has three."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

from ferret_ext.federated.settings import ConfigError

GRACE = 5.0  # seconds for a process to end by itself
START = 60.0  # seconds for a SuperLink to listen, and for a program to say its options
TRIES = 3  # of asking a program for its options
PR_SET_PDEATHSIG = 1  # of prctl(2)
CONNECTION = "ferret"  # the SuperLink's name in Flower's configuration


@dataclass(frozen=True)
class Security:
    """How the SuperLink is reached: plainly, or by TLS with these files (PEM). keys: the public keys of the
    SuperNodes that may connect; without any, all may."""

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None
    node_keys: tuple[Path, ...] = ()

    def check(self) -> None:
        """Raises ConfigError for files that are not there, or not all of them."""
        given = {
            "ssl-certfile": self.certificate,
            "ssl-keyfile": self.key,
            "ssl-ca-certfile": self.authority,
        }
        missing = [name for name, path in given.items() if path is None]
        if 0 < len(missing) < len(given):
            raise ConfigError(f"{missing[0]}: expected a file beside the others of TLS, got none")
        if self.node_keys and missing:
            raise ConfigError("supernode-key: expected TLS (--ssl-certfile ..) with keys of nodes, got none")
        for path in (*given.values(), *self.node_keys):
            if path is not None and not path.is_file():
                raise ConfigError(f"expected a file, got {str(path)!r}, which is none")

    def arguments(self) -> list[str]:
        if self.certificate is None:
            return ["--insecure"]
        files = {
            "ssl-certfile": self.certificate,
            "ssl-keyfile": self.key,
            "ssl-ca-certfile": self.authority,
        }
        pairs = [item for name, path in files.items() for item in (f"--{name}", str(path))]
        return [*pairs, *(["--enable-supernode-auth"] if self.node_keys else [])]


@cache
def takes(name: str, option: str) -> bool:
    """Whether a program of Flower's has this option. Raises ConfigError where it does not say."""
    command = [*program(name), "--help"]
    for _ in range(TRIES):  # one that is killed says nothing, which must not be taken for a no
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=START)
        except subprocess.TimeoutExpired:
            got = f"nothing within {START:g} s"
            continue
        if ran.returncode == 0:
            return f" {option} " in ran.stdout
        got = f"exit status {ran.returncode}: {(ran.stderr.strip().splitlines() or ['no words'])[-1]:.300}"
    raise ConfigError(f"flower: expected {name} --help to say its options, got {got}")


def superlink(host: str, port: int, security: Security) -> tuple[list[str], str]:
    """The command of a SuperLink that clients reach there, and the address that `flwr run` goes to."""
    command = [*program("flower-superlink"), *security.arguments()]
    if takes("flower-superlink", "--port"):
        local = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        return [*command, "--host", host or "0.0.0.0", "--port", str(port)], f"{local}:{port}"
    control, runtime = (f"127.0.0.1:{free_port()}" for _ in range(2))
    addresses = ["--fleet-api-address", f"{host or '0.0.0.0'}:{port}", "--control-api-address", control]
    return [*command, *addresses, "--serverappio-api-address", runtime], control


def supernode(
    address: str, client: int, path: Path, authority: Path | None = None, key: Path | None = None
) -> list[str]:
    """The command of a SuperNode whose client's worker is at the socket `path`.

    authority: the certificate that the SuperLink's is checked against; without it nothing is encrypted. key:
    the node's private one.
    """
    config = f"partition-id={client} socket={json.dumps(str(path))}"
    command = [*program("flower-supernode"), "--superlink", address, "--node-config", config]
    command += ["--root-certificates", str(authority)] if authority else ["--insecure"]
    command += ["--auth-supernode-private-key", str(key)] if key else []
    port = str(free_port())
    if takes("flower-supernode", "--port"):
        return [*command, "--host", "127.0.0.1", "--port", port]
    return [*command, "--clientappio-api-address", f"127.0.0.1:{port}"]


def program(name: str) -> list[str]:
    """A program of Flower's, beside this Python or on PATH. Raises ConfigError."""
    try:
        version("flwr")
    except PackageNotFoundError:
        raise ConfigError(
            "flower: expected flwr to be installed, got none; in the source tree, pip install '.[flower]'"
        ) from None
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ConfigError(f"flower: expected the program {name} beside {sys.executable} or on PATH, got none")
    return [found]


def environment(home: Path) -> dict[str, str]:
    """For Flower's processes: nothing is installed at run time, nothing is reported, files are in `home`, and
    what is installed is imported, not a source tree that we may be in."""
    quiet = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    places = {"FLWR_HOME": str(home), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    python = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **quiet, **places, **python, "PATH": path}


def write_connection(home: Path, address: str, security: Security) -> None:
    """Has `flwr` in this home reach the SuperLink under the name `CONNECTION`."""
    trust: Mapping[str, object] = (
        {"root-certificates": str(security.authority.absolute())}
        if security.authority
        else {"insecure": True}
    )
    lines = [f"{name} = {json.dumps(value)}" for name, value in {"address": address, **trust}.items()]
    text = "\n".join([f'[superlink]\ndefault = "{CONNECTION}"\n', f"[superlink.{CONNECTION}]", *lines])
    (home / "config.toml").write_text(text + "\n", "utf-8")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = START) -> None:
    """Waits until something listens there. Raises ConfigError where the process ends before it does."""
    host, _, port = address.rpartition(":")
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise ConfigError(f"listen: expected a server at {address} within {seconds:g} s, got none; see its log")


class Processes:
    """Processes that end with this one, also where it is killed. A context manager.

    Each leads a group of its own, so that those that it has started end with it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        """log: a file that what it says is added to; without one it is shown."""
        with log.open("ab") if log else nullcontext() as file:
            process = subprocess.Popen(
                command,
                env=self._environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT if file else None,
                preexec_fn=_end_with_parent,
            )
        self._running.append(process)
        return process

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._running:
                _signal(process, number)
            limit = time.monotonic() + GRACE
            for process in self._running:
                try:
                    process.wait(max(0.0, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue


def _end_with_parent() -> None:
    """In a new process: has Linux send it SIGTERM when its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To all of its group, also where the process itself has ended."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return
