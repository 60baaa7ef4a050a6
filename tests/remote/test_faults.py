"""Federations whose processes die and whose network fails: the scripts beside this file, once each."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed (pip install '.[flower]')")

import crashes
import networks
from networks import Wire, namespace
from real_federation import outcome, undisturbed

pytestmark = pytest.mark.slow

ASK = """
import socket, sys, time
begun = time.monotonic()
try:
    with socket.create_connection((sys.argv[1], 5000), float(sys.argv[2])) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
except OSError as error:
    print(type(error).__name__)
else:
    print(time.monotonic() - begun)
"""
ANSWER = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(connection.recv(1))
        connection.close()
"""


@pytest.fixture
def wire() -> Iterator[tuple[Wire, str]]:
    """A wire with something that answers at its end, and the namespace of the other end."""
    with ExitStack() as stack:
        try:
            server, client = (
                stack.enter_context(namespace(f"ferret-test-{os.getpid()}-{end}")) for end in "sc"
            )
            made = stack.enter_context(Wire(0, server, client))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces and TUN devices here: {error}")
        command = ["ip", "netns", "exec", server, sys.executable, "-c", ANSWER]
        answers = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(answers.kill)
        assert answers.stdout
        assert answers.stdout.readline() == b"ready\n"
        yield made, client


def ask(wire: Wire, client: str, patience: float) -> str:
    command = ["ip", "netns", "exec", client, sys.executable, "-c", ASK, wire.server, str(patience)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_wire_carries_what_it_is_told_to(wire: tuple[Wire, str]) -> None:
    made, client = wire
    assert float(ask(made, client, 60)) > 0
    made.delay = 0.5
    assert float(ask(made, client, 60)) > 2  # there and back for the connection, and for the byte
    made.delay, made.loss = 0.0, 1.0
    assert ask(made, client, 2) == "TimeoutError"
    made.loss = 0.0
    made.plug(into=False)
    assert ask(made, client, 60) == "OSError"  # no route, at once
    made.plug(into=True)
    assert float(ask(made, client, 60)) > 0


def test_nothing_else_leads_out_of_a_namespace(wire: tuple[Wire, str]) -> None:
    _, client = wire
    shown = subprocess.run(["ip", "-n", client, "-o", "link"], capture_output=True, text=True, check=True)
    assert [line.split()[1].rstrip(":") for line in shown.stdout.splitlines()] == ["lo", "wire0"]
    with socket.socket() as listening:
        listening.bind(("0.0.0.0", 0))
        listening.listen()
        port = str(listening.getsockname()[1])
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 60)"
        command = ["ip", "netns", "exec", client, sys.executable, "-c", program]
        assert b"ConnectionRefusedError" in subprocess.run(command, capture_output=True).stderr


@pytest.mark.flower
def test_a_network_that_fails_changes_no_weights(tmp_path: Path, wire: tuple[Wire, str]) -> None:
    happened = networks.federate(tmp_path, random.Random(1))
    assert happened["seconds of faults"] > 0
    assert outcome(tmp_path / "run") == undisturbed(tmp_path / "alone")


@pytest.mark.flower
def test_processes_that_die_change_no_weights(tmp_path: Path) -> None:
    happened = crashes.federate(tmp_path, 4, random.Random(1))
    assert sum(happened[kind] for kind in crashes.KINDS) > 0
    assert outcome(tmp_path / "run") == undisturbed(tmp_path / "alone")
