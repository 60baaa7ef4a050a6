"""`ferret doctor`: whether this machine has what a run or a federation needs, a line each with a verdict."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

import ferret_ext
from ferret_ext import known_answers, ops
from ferret_ext.federated import config as configuration
from ferret_ext.federated import dry_run, estimate, models
from ferret_ext.federated.report import processor
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.units import in_words

Verdict = Literal["ok", "warning", "fails"]
EXTRAS = {  # what each brings
    "peft": ("peft",),
    "scores": ("rouge", "rouge-score"),
    "flower": ("flwr",),
    "secure": ("cryptography", "pycryptodome"),
    "privacy": ("dp-accounting",),
}
SECONDS = 3.0  # to wait for another machine


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and in words what was found; what helps, where something is wrong."""

    what: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<8}{self.what}: {self.text}"


def examine(
    model: str | None = None, out: Path = Path(), listen: str | None = None, connect: str | None = None
) -> Iterator[Finding]:
    """Every finding in turn.

    model: folder or hub name whose memory and disk are looked at, the latter where `out` is. listen, connect:
    HOST:PORT that a server here would listen on, or that a client here would have to reach. Raises
    ConfigError for addresses that are none.
    """
    for address in filter(None, (listen, connect)):
        parse_address(address)
    yield _versions()
    yield _extras()
    yield _cpu()
    yield _cuda_build()
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)
    yield from _streams()
    if model is not None:
        yield from _room(model, out)
    if listen is not None:
        yield _listening(listen)
    if connect is not None:
        yield _connecting(connect)


# ---- what is installed ----


def _versions() -> Finding:
    text = f"ferret-ext {ferret_ext.__version__}, torch {torch.__version__}, "
    return Finding("versions", "ok", text + f"transformers {version('transformers')}")


def _extras() -> Finding:
    """None of them is needed until a setting asks for it."""
    there = [name for names in EXTRAS.values() for name in names if _installed(name)]
    absent = ",".join(extra for extra, names in EXTRAS.items() if not {*names} <= {*there})
    text = ", ".join(f"{name} {version(name)}" for name in there) or "none installed"
    more = f"; for more, in the source tree, pip install '.[{absent}]'" if absent else ""
    return Finding("extras", "ok", text + more)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _cpu() -> Finding:
    paths = ferret_ext.cpu_capability()
    available = ", ".join(paths["available"])
    text = f"{processor()}, torch threads: {torch.get_num_threads()}, path {paths['isa']} of {available}"
    if paths["isa"] != paths["available"][-1]:
        return Finding("processor", "warning", f"{text}: FERRET_CPU_ISA chooses a slower one")
    if paths["available"] == ["scalar"]:
        return Finding("processor", "warning", f"{text}: without vector instructions it is slow")
    return Finding("processor", "ok", text)


def _cuda_build() -> Finding:
    """Whether the kernels for GPUs are there, and if not, what it would take."""
    built, toolkit = ops.has_cuda(), _toolkit()
    text = (
        f"kernels {'built' if built else 'not built'}, torch for {_torch_kind()}, toolkit {toolkit or 'none'}"
    )
    if built or not torch.cuda.is_available():
        return Finding("CUDA", "ok", text)
    return Finding("CUDA", "fails", f"{text}; there is a GPU: FERRET_CUDA=ON pip install . with nvcc at hand")


def _torch_kind() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _toolkit() -> str | None:
    """The version of nvcc, where there is one."""
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        return None
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else "of an unknown version"


def _gpu(index: int) -> Finding:
    about = torch.cuda.get_device_properties(index)
    free, total = map(in_words, torch.cuda.mem_get_info(index))
    text = f"{about.name}, sm_{about.major}{about.minor}, {free} of {total} free"
    if (about.major, about.minor) < (8, 0):
        return Finding(f"GPU {index}", "fails", f"{text}; compute capability 8.0 or higher is needed")
    return Finding(f"GPU {index}", "ok", text)


# ---- known answers ----


def _streams() -> Iterator[Finding]:
    """The same bits everywhere, or not: on each path of the processor and each GPU."""
    for path in ferret_ext.cpu_capability()["available"]:
        with _isa(path):
            yield _answers(f"streams on {path}", "cpu")
    if ops.has_cuda():
        for index in range(torch.cuda.device_count()):
            yield _answers(f"streams on cuda:{index}", f"cuda:{index}")


def _answers(what: str, device: str) -> Finding:
    count = len(known_answers.RECORDS)
    try:
        wrong = known_answers.wrong(device)
    except RuntimeError as error:
        return Finding(what, "fails", str(error).partition("\n")[0])
    if wrong:
        text = (
            f"{len(wrong)} of {count} known answers are wrong, the first: {wrong[0]}; do not use this device"
        )
        return Finding(what, "fails", text)
    return Finding(what, "ok", f"all {count} known answers, to the bit")


@contextmanager
def _isa(name: str) -> Iterator[None]:
    before = ferret_ext.cpu_capability()["isa"]
    ferret_ext.set_cpu_isa(name)
    try:
        yield
    finally:
        ferret_ext.set_cpu_isa(before)


# ---- room for a model ----


def _room(name: str, out: Path) -> Iterator[Finding]:
    """Memory and disk of a simulation with default settings on this model."""
    config = configuration.build([("model", name), ("dtype", "auto")], required=["model"])
    try:
        model = models.skeleton(name, config.dtype)
    except ConfigError as error:
        yield Finding("model", "fails", str(error).removeprefix("model: "))
        return
    device = models.pick_device("auto")
    free, needed = dry_run.free_memory(device), sum(estimate.memory(config, model).values())
    text = f"about {in_words(needed)} for {name} on {device}"
    if free is None:
        yield Finding("memory", "warning", f"{text}; this system does not say how much is free")
    else:
        text = f"{text}, {in_words(free)} free"
        advice = "" if needed <= free else "; ferret simulate --dry-run says what it is for"
        yield Finding("memory", "fails" if needed > free else _tight(needed, free), text + advice)
    size, left = estimate.disk(config, model), dry_run.free_disk(out)
    text = f"about {in_words(size)} for a run's folder, {in_words(left)} free at {out}/"
    yield Finding("disk", "fails" if size > left else _tight(size, left), text)


def _tight(needed: int, free: int) -> Verdict:
    return "warning" if needed > 0.8 * free else "ok"


# ---- network ----


def _listening(address: str) -> Finding:
    what, (host, port) = f"listening on {address}", parse_address(address)
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        return Finding(
            what, "fails", f"{error.strerror or error}; choose another port, or end what has this one"
        )
    return Finding(
        what, "ok", "the port is free; whether others reach it, ferret doctor --connect says there"
    )


def _connecting(address: str) -> Finding:
    what, place = f"connecting to {address}", parse_address(address)
    try:
        with socket.create_connection(place, timeout=SECONDS):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(
            what, "fails", f"{reason}; is the server running, and its port open in every firewall?"
        )
    return Finding(what, "ok", "the server answers")


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT, or :PORT for all of this machine's addresses. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"address: expected HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)
