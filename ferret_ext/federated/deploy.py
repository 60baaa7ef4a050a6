"""The commands of `ferret` for parties on several machines: serve, join, worker, flower-init."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ferret_ext.federated import config as configuration
from ferret_ext.federated.command import (
    Command,
    add_settings,
    make_console,
    make_parser,
    numbers,
    read_settings,
    settings_parser,
    with_saved,
)
from ferret_ext.federated.explain import REFUSED
from ferret_ext.federated.settings import ConfigError, Setting, read_override

if TYPE_CHECKING:
    from ferret_ext.federated.engines.flower.processes import Processes, Security

DEFAULT_PORT = 9092  # Flower's own for SuperNodes
RESTART = 5.0  # seconds until a process that has ended is started again

SERVE_EXAMPLES = """examples:
  ferret serve --preset demo --out runs/two --num-clients 2
  ferret serve --config run.yaml --out runs/two --listen 0.0.0.0:9092 --ssl-certfile server.pem \\
      --ssl-keyfile server.key --ssl-ca-certfile ca.crt --supernode-key a.pub --supernode-key b.pub
  ferret serve --out runs/two --resume
"""
JOIN_EXAMPLES = """examples:
  ferret join 127.0.0.1:9092 --clients 0,1 --share model=builtin:tiny-llama data=builtin:gsm8k
  ferret join server.example:9092 --clients 3 --nproc-per-node 4 model=MODEL data=mine.jsonl
  ferret join server.example:9092 --clients 3 --root-certificates ca.crt \\
      --auth-supernode-private-key node.key model=MODEL data=mine.jsonl
"""
WORKER_EXAMPLES = """examples:
  ferret worker /run/user/1000/ferret/0 --client 0 model=MODEL data=mine.jsonl
  torchrun --standalone --nproc-per-node 4 -m ferret_ext.federated worker /run/user/1000/ferret/0 \\
      --client 0 model=MODEL data=mine.jsonl
"""
INIT_EXAMPLES = """examples:
  ferret flower-init app/ --preset demo --out runs/flower --num-clients 2
  flwr run app/ --run-config "rounds=5"
"""


# ---- serve ----


def serve_parser() -> argparse.ArgumentParser:
    parser = settings_parser(
        "serve",
        "Federated rounds with clients that connect from elsewhere (ferret join): starts Flower's SuperLink "
        "and the run on it, and ends with it. A run that was interrupted, or killed, goes on with --resume.",
        SERVE_EXAMPLES,
        "[--out FOLDER] [--listen HOST:PORT] [TLS and keys]",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out has part of")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default=f"127.0.0.1:{DEFAULT_PORT}", help="default %(default)s"
    )
    parser.add_argument("--ssl-certfile", metavar="PEM", type=Path, help="TLS: the server's certificate")
    parser.add_argument("--ssl-keyfile", metavar="PEM", type=Path, help="TLS: its private key")
    parser.add_argument("--ssl-ca-certfile", metavar="PEM", type=Path, help="TLS: who has signed it")
    parser.add_argument(
        "--supernode-key",
        metavar="PUB",
        type=Path,
        action="append",
        default=[],
        help="public key of a SuperNode that may connect, one for each; without any, all may",
    )
    parser.add_argument("--superlink-log", metavar="FILE", type=Path, help="what the SuperLink says")
    add_settings(parser, list(configuration.leaves()))
    return parser


def run_server(options: argparse.Namespace) -> int:
    """The SuperLink, and the run on it."""
    from ferret_ext.federated.doctor import parse_address
    from ferret_ext.federated.engines.flower import folder as app_folder
    from ferret_ext.federated.engines.flower import processes
    from ferret_ext.federated.engines.flower.link import number_of_clients
    from ferret_ext.federated.report import RunFolder

    _interrupt_when_told_to_end()
    config = configuration.build(with_saved(options, read_settings(options)))
    number_of_clients(config)
    host, port = parse_address(options.listen)
    security = _security(options)
    run = RunFolder(config, options.overwrite, options.resume)
    if options.resume and run.finished:
        print(f"finished before: {run.path}")
        return 0
    with _home() as home:
        app_folder.write(home / "app", config)
        command, control = processes.superlink(host, port, security)
        processes.write_connection(home, control, security)
        with processes.Processes(processes.environment(home)) as running:
            link = running.start(command, options.superlink_log or home / "superlink.log")
            processes.wait_for(control, link)
            _register(running, security)
            if options.overwrite:
                run.begin()  # removes what the ServerApp would go on with
            flwr = processes.program("flwr")
            running.start([*flwr, "run", str(home / "app"), processes.CONNECTION, "--stream"]).wait()
    if not run.finished:
        print(f"ferret serve: error: the run has stopped; {run.path} goes on with --resume", file=sys.stderr)
        return REFUSED
    return 0


def _security(options: argparse.Namespace) -> Security:
    from ferret_ext.federated.engines.flower.processes import Security

    files = (options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certfile)
    security = Security(*files, tuple(options.supernode_key))
    security.check()
    return security


def _register(running: Processes, security: Security) -> None:
    """Tells the SuperLink which SuperNodes may connect. Raises ConfigError."""
    from ferret_ext.federated.engines.flower import processes

    for key in security.node_keys:
        register = [*processes.program("flwr"), "supernode", "register", str(key), processes.CONNECTION]
        if running.start(register).wait():
            raise ConfigError(f"supernode-key: expected a public key that Flower takes, got {str(key)!r}")


# ---- join ----


def join_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "join",
        "Takes part in a run elsewhere (ferret serve), as one client or several: for each of them a worker, "
        "which keeps model and data, and Flower's SuperNode, which connects to the server. Both are started "
        "again when they end. Runs until it is interrupted.",
        JOIN_EXAMPLES,
    )
    parser.add_argument("server", metavar="HOST:PORT", help="where the SuperLink is")
    parser.add_argument("--clients", type=numbers, required=True, help="who this is, e.g. 0 or 0,1")
    parser.add_argument(
        "--root-certificates", metavar="PEM", type=Path, help="TLS: who has signed the server's"
    )
    parser.add_argument(
        "--auth-supernode-private-key",
        metavar="KEY",
        type=Path,
        action="append",
        default=[],
        help="by which the server knows the node, one for each client",
    )
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        type=_count,
        default=1,
        help="processes that are one client together, each with a GPU and a part of the model; default 1",
    )
    parser.add_argument("--logs", metavar="FOLDER", type=Path, help="what the SuperNodes say")
    _add_party(parser)
    return parser


def _add_party(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share",
        action="store_true",
        help="train on the client's part of data as the run's settings deal it out, instead of all of it",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="model=, data= and other settings of this machine"
    )


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


def run_join(options: argparse.Namespace) -> int:
    """Workers and SuperNodes, until it is interrupted."""
    from ferret_ext.federated.doctor import parse_address
    from ferret_ext.federated.engines.flower import processes
    from ferret_ext.federated.worker.worker import check_own

    _interrupt_when_told_to_end()
    parse_address(options.server)
    check_own(_own(options))
    _check_devices(options)
    keys = options.auth_supernode_private_key or [None] * len(options.clients)
    if len(keys) != len(options.clients):
        raise ConfigError(
            f"auth-supernode-private-key: expected {len(options.clients)}, one a client, got {len(keys)}"
        )
    with ExitStack() as stack:
        home = stack.enter_context(_home())
        logs = options.logs or home
        logs.mkdir(parents=True, exist_ok=True)
        running = stack.enter_context(processes.Processes(processes.environment(home)))
        programs = []
        for client, key in zip(options.clients, keys, strict=True):
            path = home / f"client-{client}"
            programs.append(Program(f"client {client}'s worker", _worker_command(options, client, path)))
            node = processes.supernode(options.server, client, path, options.root_certificates, key)
            programs.append(Program(f"client {client}'s SuperNode", node, logs / f"supernode-{client}.log"))
        numbers = ", ".join(map(str, options.clients))
        print(f"ferret join: clients {numbers} wait for runs at {options.server}; Ctrl-C ends it", flush=True)
        _keep_running(running, programs)
    return 0


def _check_devices(options: argparse.Namespace) -> None:
    """Raises ConfigError where several processes have no device each, which torchrun would not tell apart."""
    if options.nproc_per_node > 1:
        from ferret_ext.federated.ranks import own_device

        own_device(_device(options), 0, options.nproc_per_node)


def _worker_command(options: argparse.Namespace, client: int, path: Path) -> list[str]:
    share = ["--share"] if options.share else []
    command = ["-m", "ferret_ext.federated", "worker", str(path), "--client", str(client)]
    if (count := options.nproc_per_node) > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *command]
    return [sys.executable, *command, *share, *options.overrides]


@dataclass(frozen=True)
class Program:
    """What join keeps running. log: where it says what it does; without one it is shown."""

    name: str
    command: list[str]
    log: Path | None = None


def _keep_running(running: Processes, programs: Sequence[Program]) -> None:
    """Starts the programs, and again those that end. Raises ConfigError where one refuses its settings."""
    started = [running.start(program.command, program.log) for program in programs]
    while True:
        time.sleep(0.5)
        for place, (process, program) in enumerate(zip(started, programs, strict=True)):
            if process.poll() is None:
                continue
            if process.returncode == REFUSED and program.log is None:
                raise ConfigError(f"join: {program.name} has refused its settings; see above")
            said = f"; {last_error(program.log)}" if program.log else ""
            print(f"ferret join: {program.name} ended and is started again{said}", flush=True)
            time.sleep(RESTART)
            started[place] = running.start(program.command, program.log)


def last_error(log: Path) -> str:
    """The last thing in a log that looks like an error, to the end of its paragraph, else its last line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text("utf-8", "replace"))
    errors = re.findall(r"ERROR\s*:?\s*(.*(?:\n(?![A-Z]+\s*:).+)*)", text)
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join((errors or lines or ["it has said nothing"])[-1].split())[:300]


def _interrupt_when_told_to_end() -> None:
    """SIGTERM, as a supervisor sends it, is taken for Ctrl-C: what was started ends too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _home() -> Iterator[Path]:
    """A folder of this user alone, for sockets and Flower's files."""
    with tempfile.TemporaryDirectory(prefix="ferret-") as name:
        yield Path(name)


# ---- worker ----


def worker_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "worker",
        "Keeps a client's model, data, optimiser and place in the run, and answers calls at a Unix domain "
        "socket that nobody but its user can reach. The run's settings come from the server. ferret join "
        "starts one by itself. Processes that torchrun starts are one worker, each with a part of the model.",
        WORKER_EXAMPLES,
    )
    parser.add_argument(
        "socket", metavar="SOCKET", type=Path, help="its folder is made, or must have mode 700"
    )
    parser.add_argument("--client", type=int, required=True, help="who this is, from 0 on")
    _add_party(parser)
    return parser


def run_worker(options: argparse.Namespace) -> int:
    """One worker, or one process of those that are one together, until it is interrupted."""
    from ferret_ext.federated.console import Lines
    from ferret_ext.federated.worker.serving import serve
    from ferret_ext.federated.worker.worker import Worker

    _interrupt_when_told_to_end()
    if not 0 <= options.client < 2**32:
        raise ConfigError(f"client: expected a number in [0, 2^32), got {options.client}")
    lines = Lines(make_console())

    def say(text: str) -> None:
        lines.say(f"client {options.client}: {text}")

    path = options.socket.expanduser().absolute()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ferret_ext.federated.worker import team

        team.run(path, options.client, _own(options), _device(options), say, share=options.share)
    else:
        serve(Worker(options.client, _own(options), say, share=options.share), path)
    return 0


def _own(options: argparse.Namespace) -> list[Setting]:
    return [read_override(text) for text in options.overrides]


def _device(options: argparse.Namespace) -> str:
    """The device that this party sets for itself."""
    return str(dict(_own(options)).get("device", "auto"))


# ---- flower-init ----


def init_parser() -> argparse.ArgumentParser:
    parser = settings_parser(
        "flower-init",
        "Writes a Flower app: a run's settings in pyproject.toml, and the ServerApp and ClientApp. flwr run "
        "starts it on any SuperLink; started again, it goes on with what --out has.",
        INIT_EXAMPLES,
        "FOLDER",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new or empty one")
    parser.add_argument(
        "--simulation",
        action="store_true",
        help="for Flower's simulation: clients take turns in its processes, and need no workers",
    )
    add_settings(parser, list(configuration.leaves()))
    return parser


def run_init(options: argparse.Namespace) -> int:
    """One folder."""
    from ferret_ext.federated.console import Lines
    from ferret_ext.federated.engines.flower import folder
    from ferret_ext.federated.engines.flower.link import number_of_clients

    config = configuration.build(read_settings(options))
    number_of_clients(config)
    if options.simulation and config.training.keep_state:
        raise ConfigError("training.keep_state: expected false with --simulation, got true")
    folder.write(options.folder.expanduser(), config, options.overwrite, simulation=options.simulation)
    Lines(make_console()).say(f"{options.folder}: {', '.join(folder.FILES)}; next: flwr run {options.folder}")
    return 0


COMMANDS = {
    "serve": Command("run rounds with clients elsewhere", serve_parser, run_server),
    "join": Command("take part in a run elsewhere", join_parser, run_join),
    "worker": Command("keep a client's model and data, and train when asked", worker_parser, run_worker),
    "flower-init": Command("write a Flower app", init_parser, run_init),
}
