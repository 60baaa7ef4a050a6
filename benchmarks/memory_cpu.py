"""Memory that the CPU operators take beyond their tensors: a call's peak resident memory less that before it.

    python benchmarks/memory_cpu.py --json FILE [--numel 100000000] [--K 1024] [--threads 1 2]

Every figure is of the first call in a process of its own, whose tensors have been written and whose threads
have been started, so nothing hides in memory that an earlier call has left behind. It therefore holds the
code and data that any first call loads: beside it stands what the call takes for a tensor of one tile.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from cases import SEED, filled, make_plan
from timer import write

import ferret_ext
from ferret_ext.plan import TILE

OPERATORS = ("project", "project_difference", "reconstruct_", "apply_")
UPDATES = 10  # of one apply_


def extra_memory(operator: str, numel: int, K: int, threads: int) -> int:
    """Bytes at the peak of one call, beyond what its process held before, in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(extra_memory_here, operator, numel, K, threads).result()


def extra_memory_here(operator: str, numel: int, K: int, threads: int) -> int:
    """The same in this process."""
    torch.set_num_threads(threads)
    call = prepare(operator, numel, K)
    torch.ones(1 << 20).sum()  # starts the threads
    before = forget_peak()
    call()
    return resident("VmHWM") - before


def prepare(operator: str, numel: int, K: int) -> Callable[[], object]:
    """The call, with its tensors written."""
    plan, x = make_plan([numel], [K]), filled(numel)
    gammas = torch.full((K,), 1e-6)
    if operator == "project":
        return partial(ferret_ext.project, x, SEED, K)
    if operator == "project_difference":
        return partial(ferret_ext.project_difference, plan, [x], [x.clone()], SEED)
    if operator == "reconstruct_":
        return partial(ferret_ext.reconstruct_, x, gammas, SEED)
    updates = [(seed, gammas, 1.0) for seed in range(UPDATES)]
    return partial(ferret_ext.apply_, plan, [x], updates, 1.0)


def forget_peak() -> int:
    """Makes the present resident memory the peak of this process so far, and returns it."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmHWM")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmHWM is the peak of resident memory, VmRSS its present size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=10**8, help="of the delta or parameter, in float32")
    parser.add_argument("--K", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="where results go too")
    arguments = parser.parse_args()

    isa = ferret_ext.cpu_capability()["isa"]
    print(f"d = {arguments.numel:,}, K = {arguments.K}, {UPDATES} updates in apply_, path {isa}")
    print(f"{'':20} thr {'extra bytes':>12} {'a thread':>12} {'for one tile':>12}")
    rows = []
    for operator in OPERATORS:
        for threads in arguments.threads:
            extra = extra_memory(operator, arguments.numel, arguments.K, threads)
            one_tile = extra_memory(operator, TILE, arguments.K, threads)
            print(
                f"{operator:20} {threads:>3} {extra:>12,} {extra // threads:>12,} {one_tile:>12,}", flush=True
            )
            row = {"what": operator, "numel": arguments.numel, "K": arguments.K, "threads": threads}
            rows.append(row | {"extra_bytes": extra, "one_tile_bytes": one_tile})
    if arguments.json is not None:
        write(arguments.json, rows, isa=isa)


if __name__ == "__main__":
    main()
