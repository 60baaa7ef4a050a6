"""Keeps what ptxas says of every kernel: registers, spills and shared memory, by architecture.

kernel_resources.py compile COMMAND ..   runs a compiler and keeps ptxas's lines beside the object file
kernel_resources.py report OBJECT ..     prints those of all the objects as one table
kernel_resources.py check OBJECT ..     the same, and fails where a kernel spills or uses local memory
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".ptxas.txt"


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int  # of a thread
    spills: int  # bytes stored and loaded
    stack: int  # bytes of a thread
    shared: int  # bytes of a block, known at compile time


def compile_and_keep(command: list[str]) -> int:
    """Runs nvcc; its other messages pass on."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = run.stdout.splitlines(keepends=True)
    kept = [line for line in lines if line.startswith("ptxas info") or "bytes stack frame" in line]
    if run.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + SUFFIX).write_text("".join(kept))
    sys.stdout.writelines(line for line in lines if line not in kept)
    return run.returncode


def number_of(what: str, text: str) -> int:
    match = re.search(rf"(\d+) {what}", text)
    return int(match[1]) if match else 0


def parse(log: str) -> list[Kernel]:
    """After `Compiling entry function 'name' for 'sm_80'` come its stack frame, spills and registers."""
    kernels = []
    for part in log.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'(\w+)'", part)[:2]
        spills = number_of("bytes spill stores", part) + number_of("bytes spill loads", part)
        stack, shared = number_of("bytes stack frame", part), number_of("bytes smem", part)
        kernels.append(Kernel(name, architecture, number_of("registers", part), spills, stack, shared))
    return kernels


def demangle(names: list[str]) -> list[str]:
    run = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True)
    return run.stdout.splitlines()


def in_local_memory(kernels: list[Kernel]) -> str:
    """Names those that use it, which is slow: registers that are spilled, arrays that have no registers."""
    bad = [f"{k.name} ({k.architecture}: {k.spills} B spilled, {k.stack} B of stack)" for k in kernels]
    return ", ".join(text for text, k in zip(bad, kernels, strict=True) if k.spills or k.stack)


def report(kernels: list[Kernel]) -> str:
    names = [name.replace("(anonymous namespace)::", "") for name in demangle([k.name for k in kernels])]
    lines = [
        f"{k.architecture:>7} {k.registers:9d} {k.spills:7d} {k.stack:7d} {k.shared:8d}  {name}"
        for name, k in sorted(zip(names, kernels, strict=True))
    ]
    return "\n".join(["   arch registers spill B stack B shared B  kernel", *lines])


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_and_keep(sys.argv[2:]))
    kernels = [kernel for path in sys.argv[2:] for kernel in parse(Path(path + SUFFIX).read_text())]
    print(report(kernels))
    if sys.argv[1] == "check" and (bad := in_local_memory(kernels)):
        sys.exit(f"local memory: expected none, got some in {bad}")
