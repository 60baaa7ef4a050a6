"""`ferret flower-init`, and what of a federation is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from parties import MODEL

from ferret_ext.federated import config as configuration
from ferret_ext.federated import presets
from ferret_ext.federated.cli import main
from ferret_ext.federated.deploy import last_error
from ferret_ext.federated.engines.flower import folder, processes
from ferret_ext.federated.presets import PRESETS
from ferret_ext.federated.settings import flatten

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")


def app_config(path: Path) -> dict[str, Any]:
    project = tomllib.loads((path / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dependencies"] == []
    config: dict[str, Any] = project["tool"]["flwr"]["app"]["config"]
    return config


@pytest.mark.parametrize("preset", PRESETS)
def test_an_apps_configuration_is_the_runs_settings(tmp_path: Path, preset: str) -> None:
    given = [("model", MODEL), ("data", "builtin:gsm8k"), ("out", str(tmp_path / "run"))]
    config = configuration.build([*presets.settings_of(preset, "ferret"), *given])
    folder.write(tmp_path / "app", config)
    assert configuration.build(flatten(app_config(tmp_path / "app"))) == config


@pytest.mark.parametrize("text", ['quo"te\\', "line\nbreak\t", "Größe \U0001f338", "\x7f\x01", "none of it"])
def test_text_survives(tmp_path: Path, text: str) -> None:
    config = configuration.build(
        [
            ("model", MODEL),
            ("data", "d"),
            ("out", str(tmp_path / "run")),
            ("dataset.prompt", text),
            ("dataset.response", "{answer}"),
            ("evaluation.scores", "rouge-l,gsm8k-exact-match"),
        ]
    )
    folder.write(tmp_path / "app", config)
    assert configuration.build(flatten(app_config(tmp_path / "app"))) == config


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory of a ServerApp is its SuperLink's."""
    monkeypatch.chdir(tmp_path)
    Path("records.jsonl").touch()
    assert main(["flower-init", "app", "--model", MODEL, "--data", "records.jsonl", "--out", "runs/one"]) == 0
    config = app_config(tmp_path / "app")
    assert config["data"] == str(tmp_path / "records.jsonl")
    assert config["out"] == str(tmp_path / "runs" / "one")
    assert config["model"] == MODEL


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "precious").touch()
    arguments = ["flower-init", str(tmp_path), "--model", MODEL, "--data", "d", "--out", "o"]
    assert main(arguments) == 2
    assert "folder: expected a new or empty one" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "precious").exists()


def test_the_apps_are_a_line_each_and_importable(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="flwr is not installed (pip install '.[flower]')")
    folder.write(tmp_path, configuration.build([("model", MODEL), ("data", "d"), ("out", "o")]))
    program = (
        "import sys, client_app; print('torch' in sys.modules); import server_app; print(server_app.app)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith("False\n<flwr.server")


RUN = ["--model", MODEL, "--data", "builtin:gsm8k"]
TLS = ["--ssl-certfile", "a.pem", "--ssl-keyfile", "a.key", "--ssl-ca-certfile", "ca.pem"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", *RUN], "out: expected a value, got none"),
        (["serve", *RUN, "--out", "o", "--listen", "nowhere"], "address: expected HOST:PORT, got 'nowhere'"),
        (
            ["serve", *RUN, "--out", "o", "partition.kind=natural-id", "partition.column=x"],
            "num_clients: expected a number where clients are elsewhere, got none",
        ),
        (["serve", *RUN, "--out", "o", *TLS[:2]], "ssl-keyfile: expected a file beside the others of TLS"),
        (["serve", *RUN, "--out", "o", *TLS], "expected a file, got 'a.pem', which is none"),
        (["serve", *RUN, "--out", "o", "--supernode-key", "k.pub"], "supernode-key: expected TLS"),
        (
            ["serve", *RUN, "--out", "o", "federation.min_deadline=9", "federation.max_deadline=8"],
            "federation.min_deadline: expected at most federation.max_deadline, which is 8, got 9",
        ),
        (["join", "here", "--clients", "0", "model=m", "data=d"], "address: expected HOST:PORT, got 'here'"),
        (["join", "h:1", "--clients", "0", "model=m"], "data: expected a value, got none"),
        (["join", "h:1", "--clients", "0", "model=m", "data=d", "rounds=3"], "the server says all others"),
        (
            ["join", "h:1", "--clients", "0,1", "model=m", "data=d", "--auth-supernode-private-key", "k"],
            "auth-supernode-private-key: expected 2, one a client, got 1",
        ),
        (["worker", "s", "--client", "-1", "model=m", "data=d"], "client: expected a number in"),
        (
            ["worker", f"/tmp/{'x' * 200}", "--client", "0", "model=m", "data=d"],
            "a path of at most 107 bytes",
        ),
        (["worker", "/tmp/s", "--client", "0", "model=m", "data=d"], "must be closed to others"),
    ],
)
def test_bad_arguments_are_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_flower_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise processes.PackageNotFoundError

    monkeypatch.setattr(processes, "version", absent)
    with pytest.raises(ValueError, match=r"expected flwr to be installed, got none.*\[flower\]"):
        processes.program("flwr")


@pytest.mark.parametrize("one_port", [False, True], ids=["1.29", "1.41"])
def test_every_version_gets_its_own_command_line(monkeypatch: pytest.MonkeyPatch, one_port: bool) -> None:
    monkeypatch.setattr(processes, "program", lambda name: [name])
    monkeypatch.setattr(processes, "takes", lambda name, option: one_port)
    command, control = processes.superlink("0.0.0.0", 9092, processes.Security())
    assert "--insecure" in command
    assert ("--fleet-api-address" in command) != one_port
    assert ("--port" in command) == one_port
    assert control.startswith("127.0.0.1:")
    assert control.endswith(":9092") == one_port
    node = processes.supernode("server.example:9092", 3, Path("/x y/socket"))
    assert 'partition-id=3 socket="/x y/socket"' in node
    assert ("--clientappio-api-address" in node) != one_port


def test_a_program_that_is_killed_while_it_says_its_options_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or else its silence counts as an older version's for good."""
    asked, program = tmp_path / "asked", tmp_path / "flower-supernode"
    program.write_text(f'#!/bin/sh\nif mkdir {asked}; then kill -9 $$; fi\necho "  --port PORT"\n')
    program.chmod(0o700)
    monkeypatch.setattr(processes, "program", lambda name: [str(program)])
    processes.takes.cache_clear()
    assert processes.takes("flower-supernode", "--port")
    program.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    with pytest.raises(ValueError, match="--help to say its options, got exit status 3: it is broken"):
        processes.takes("flower-supernode", "--host")
    processes.takes.cache_clear()


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Killed so that it can clean up nothing."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ferret_ext.federated.engines.flower.processes import Processes\n"
        "child = Processes(os.environ).start([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    child, limit = int(ran.stdout), time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < limit
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it has said nothing"),
        ("loads\nwaits\n\n", "waits"),
        (
            "ERROR: one\nINFO: more\n\x1b[91mERROR \x1b[0m:   two\nits reason\n[why]\n\nsee\nINFO:  ended\n",
            "two its reason [why]",
        ),
        ("ERROR: broken\nWARNING : not of it\n", "broken"),
    ],
)
def test_of_a_log_the_last_error_is_shown(tmp_path: Path, log: str, said: str) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert last_error(path) == said
