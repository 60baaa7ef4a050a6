"""Rates of every operator on one GPU, beside the copy bandwidth and rivals of the same run.

    python benchmarks/bench_gpu.py --json FILE [--budget SECONDS] [--quick] [--only SECTION ..]
    python benchmarks/bench_gpu.py --profile     calls on both paths, marked for a profiler (see gpu_suite.sh)

The unit is a basis element, as in bench_cpu.py; the share of the copy bandwidth is that of the bytes an
operator must read and write. Rates are of the median call by the device's clock, beside those of the slowest
and the fastest; "host" is the time in which the host queues a call. The L2 cache is flushed before every call
(gpu_timer.py). The file is written anew every second and after every section, and what the budget leaves no
time for is named in it. `--device cpu --quick` tries the program out without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import SEED, filled, log_uniform
from gpu_cases import (
    PATHS,
    GpuCase,
    basis_case,
    by_size,
    host_difference_case,
    llama_7b,
    packed_case,
    plan_cases,
    project_case,
    reconstruct_case,
    rounding_case,
    update_case,
)
from gpu_timer import GpuTimer, GpuTiming
from rivals import gpu_rivals
from timer import Timing, write
from torch import Tensor

import ferret_ext
from ferret_ext.ops import Basis

Row = dict[str, Any]
SAVE_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Settings:
    """How much is measured. Lengths are in elements; the defaults need 60 GiB of GPU memory."""

    seconds: float = 0.25  # of timed calls a row
    numel: int = 1 << 28
    columns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
    few_columns: tuple[int, ...] = (1, 16, 64, 512)
    numels: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9, 8 * 10**9)
    size_columns: tuple[int, ...] = (1, 16, 64)
    basis_numel: int = 1 << 26
    llama: tuple[int, ...] = field(default_factory=lambda: tuple(llama_7b()))
    llama_columns: tuple[int, ...] = (1000, 16384)  # in all
    mixed_blocks: int = 300
    small_blocks: int = 100_000
    host_numel: int = 1 << 30
    host_blocks: int = 256
    clients: int = 10
    rival_numel: int = 1 << 27
    rival_columns: tuple[int, ...] = (16, 64, 512)
    call_numels: tuple[int, ...] = (10**4, 10**6)
    checked_numels: tuple[int, ...] = (10**6, 1 << 28)


QUICK = Settings(
    seconds=0.0,
    numel=5000,
    columns=(1, 16),
    few_columns=(3,),
    numels=(1000, 3000),
    size_columns=(2,),
    basis_numel=1000,
    llama=(3000, 17, 700),
    llama_columns=(12,),
    mixed_blocks=3,
    small_blocks=5,
    host_numel=6000,
    host_blocks=3,
    clients=2,
    rival_numel=2000,
    rival_columns=(4, 512),
    call_numels=(1000,),
    checked_numels=(3000,),
)


class OutOfTime(Exception):
    """The budget is spent."""


class Bench:
    """Times cases, prints and keeps a row for each, until the budget is spent."""

    def __init__(self, settings: Settings, device: torch.device, budget: float) -> None:
        self.settings = settings
        self.device = device
        self.timer = GpuTimer(device)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.copy_bandwidth = 0.0
        self._deadline = time.perf_counter() + budget
        self._save: Callable[[], None] = lambda: None
        self._saved = time.perf_counter()

    def check_time(self) -> None:
        if time.perf_counter() > self._deadline:
            raise OutOfTime

    def time_cases(self, section: str, cases: Iterable[GpuCase], **facts: Any) -> None:
        for case in cases:
            self.time_case(section, case, **facts)

    def time_case(self, section: str, case: GpuCase, **facts: Any) -> Row:
        self.check_time()
        timing = self.timer.measure(case.call, seconds=self.settings.seconds)
        nbytes = case.bytes_read + case.bytes_written
        row = {
            "section": section,
            "what": case.what,
            "basis": case.basis,
            "dtype": case.dtype,
            "numel": case.numel,
            "K": case.K,
            "clients": case.clients,
            "path": case.path,
            "rate": case.elements / timing.median,
            "bandwidth": nbytes / timing.median,
            "share_of_copy": nbytes / timing.median / self.copy_bandwidth if self.copy_bandwidth else None,
            "timing": timing,
        } | facts
        return self.keep(row)

    def keep(self, row: Row) -> Row:
        self.rows.append(row)
        print(line(row), flush=True)
        if time.perf_counter() - self._saved >= SAVE_EVERY:
            self._save()
            self._saved = time.perf_counter()
        return row

    def tensor(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return filled(numel, dtype, self.device)

    def run(self, names: Sequence[str], save: Callable[[], None]) -> None:
        """Every section; one that fails or comes too late is noted, and the next one runs.

        `save` is called after every section and, so that a run that is killed loses little, within them.
        """
        self._save = save
        for name in names:
            print(f"\n{SECTIONS[name].__doc__}", flush=True)
            try:
                self.check_time()
                SECTIONS[name](self)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            except OutOfTime:
                self.notes.append(f"{name}: no time left")
            except Exception as error:
                traceback.print_exc()
                self.notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            save()


NAMED = ("path", "basis", "dtype")


def line(row: Row) -> str:
    timing: Timing = row["timing"]
    usual = ("rademacher", "float32", PATHS[0], "")
    name = " ".join([row["what"], *(row[key] for key in NAMED if row.get(key, "") not in usual)])
    text = f"{name:34} d {row['numel']:>13,} K {row['K']:>6.4g}  {timing.median * 1e3:10.4f} ms"
    text += f" ({timing.fastest * 1e3:.4f} .. {timing.slowest * 1e3:.4f})"
    if isinstance(timing, GpuTiming):
        text += f" host {timing.host * 1e3:8.4f} ms"
    if "rate" in row:
        text += f" {row['rate'] / 1e12:8.3f} T/s"
    if row.get("bandwidth"):
        text += f" {row['bandwidth'] / 1e12:6.3f} TB/s"
    if row.get("share_of_copy"):
        text += f" {row['share_of_copy']:4.0%} of copy"
    if "ratio" in row:
        text += f" {row['ratio']:8.4f} x project"
    return text


# ---- sections ----


def copy(bench: Bench) -> None:
    """Yardsticks: copy (bytes read and written), update in place, read"""
    x = bench.tensor(4 * bench.settings.numel)
    y = torch.empty_like(x)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (partial(y.copy_, x), 2 * x.nbytes),
        "update in place": (partial(x.add_, 1), 2 * x.nbytes),
        "read": (x.sum, x.nbytes),
    }
    for what, (call, nbytes) in calls.items():
        timing = bench.timer.measure(call, seconds=bench.settings.seconds)
        bandwidth = nbytes / timing.median
        row = {"section": "copy", "what": what, "numel": x.numel(), "K": 0, "bandwidth": bandwidth}
        bench.keep(row | {"timing": timing})
        if what == "copy":
            bench.copy_bandwidth = bandwidth


def checks(bench: Bench) -> None:
    """The same bits as the CPU's: project and reconstruct_ on both paths, K = 16"""
    for numel in bench.settings.checked_numels:
        bench.check_time()
        here = filled(numel)
        there, gamma = here.to(bench.device, copy=True), ferret_ext.project(here, SEED, 16)
        ferret_ext.reconstruct_(here, gamma, SEED)
        same = {}
        for path in PATHS:
            with on_path(path):
                same["project", path] = torch.equal(ferret_ext.project(there, SEED, 16).cpu(), gamma)
                rebuilt = there.clone()
                ferret_ext.reconstruct_(rebuilt, gamma.to(bench.device), SEED)
                same["reconstruct_", path] = torch.equal(rebuilt.cpu(), here)
                del rebuilt
        for (what, path), equal in same.items():
            row = {"section": "checks", "what": what, "path": path, "numel": numel, "K": 16, "same": equal}
            bench.rows.append(row)
            print(f"{what + ' ' + path:34} d {numel:>13,} {'the same' if equal else 'DIFFERENT'}", flush=True)


def columns(bench: Bench) -> None:
    """Into new memory, with every K; `paths` has the other operators"""
    x = bench.tensor(bench.settings.numel)
    bench.time_cases("columns", [reconstruct_case(x, K) for K in bench.settings.columns])


def paths(bench: Bench) -> None:
    """Project and reconstruct_ with every K, and a 7B Llama's plan in bfloat16, on both paths"""
    x = bench.tensor(bench.settings.numel)
    narrow = x.bfloat16()
    cases = [case(x, K) for K in bench.settings.columns for case in (project_case, update_case)]
    cases += [case(narrow, K) for K in bench.settings.few_columns for case in (project_case, update_case)]
    for K in bench.settings.llama_columns:
        of_blocks = by_size(bench.settings.llama, K)
        clients = bench.settings.clients
        cases += plan_cases(bench.settings.llama, of_blocks, torch.bfloat16, bench.device, clients)
    for case in cases:
        for path in PATHS:
            with on_path(path):
                bench.time_case("paths", case)


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """The CUDA kernels that project takes, which are chosen at every call."""
    before = os.environ.get("FERRET_CUDA_PATH", "")
    os.environ["FERRET_CUDA_PATH"] = path
    try:
        yield
    finally:
        os.environ["FERRET_CUDA_PATH"] = before


def plans(bench: Bench) -> None:
    """Plans: blocks of 1000 to 10^7 elements; very many small blocks"""
    settings = bench.settings
    mixed = log_uniform(1000, 10_000_000, settings.mixed_blocks, seed=0)
    small = [10_000] * settings.small_blocks
    shapes = {
        "mixed": (mixed, log_uniform(4, 512, len(mixed), seed=1)),
        "small blocks": (small, [16] * len(small)),
    }
    for shape, (numels, of_blocks) in shapes.items():
        cases = plan_cases(numels, of_blocks, torch.float32, bench.device, settings.clients)
        bench.time_cases("plans", cases, shape=shape, blocks=len(numels))


def from_host(bench: Bench) -> None:
    """project_difference with `old` in pinned memory: bytes of it, beside a copy of them; the host's clock"""
    numel = bench.settings.host_numel
    new = bench.tensor(numel, torch.bfloat16)
    old = torch.zeros(numel, dtype=torch.bfloat16, pin_memory=bench.device.type == "cuda")
    buffer = torch.empty_like(new)
    case = host_difference_case(old, new, bench.settings.host_blocks)
    ways: dict[str, tuple[Callable[[], object], Row]] = {
        "copy from the host": (partial(buffer.copy_, old, non_blocking=True), {"K": 0}),
        case.what: (case.call, {"K": case.K, "path": case.path}),
    }
    copied = 0.0
    for what, (call, facts) in ways.items():
        bench.check_time()
        timing = bench.timer.measure_host(call, seconds=bench.settings.seconds, calls=2)
        bandwidth = old.nbytes / timing.median
        row = {"section": "from_host", "what": what, "dtype": "bfloat16", "numel": numel} | facts
        if copied:
            row |= {"rate": case.elements / timing.median, "share_of_copy": bandwidth / copied}
        copied = copied or bandwidth
        bench.keep(row | {"bandwidth": bandwidth, "timing": timing})


def updates(bench: Bench) -> None:
    """Stochastic rounding, and coordinates in codes of one bit"""
    x = bench.tensor(bench.settings.numel, torch.bfloat16)
    cases = [rounding_case(x, K) for K in bench.settings.few_columns]
    bench.time_cases("updates", cases + [packed_case(x, K) for K in bench.settings.few_columns])


def rivals(bench: Bench) -> None:
    """What else one could use"""
    delta = bench.tensor(bench.settings.rival_numel)
    for K in bench.settings.rival_columns:
        ours = bench.time_case("rivals", project_case(delta, K))
        for name, call in gpu_rivals(K).items():
            bench.check_time()
            rival = partial(call, delta, SEED, K)
            timing = bench.timer.measure(rival, seconds=bench.settings.seconds, least=3)
            rate = delta.numel() * K / timing.median
            row = {
                "section": "rivals",
                "what": f"rival: {name}",
                "numel": delta.numel(),
                "K": K,
                "rate": rate,
            }
            bench.keep(row | {"ratio": rate / ours["rate"], "timing": timing})


def dtypes(bench: Bench) -> None:
    """Tensors of float16 and float64; `paths` has bfloat16"""
    for dtype in (torch.float16, torch.float64):
        x = bench.tensor(bench.settings.numel, dtype)
        for K in bench.settings.few_columns:
            bench.time_cases("dtypes", [project_case(x, K), update_case(x, K)])


def bases(bench: Bench) -> None:
    """The other two bases, and single columns"""
    x = bench.tensor(bench.settings.basis_numel)
    for basis in ("uniform", "gaussian"):
        for K in bench.settings.few_columns:
            bench.time_cases("bases", [project_case(x, K, basis), update_case(x, K, basis)])
    every: tuple[Basis, ...] = ("rademacher", "uniform", "gaussian")
    bench.time_cases("bases", [basis_case(x, basis) for basis in every])


def sizes(bench: Bench) -> None:
    """Every size"""
    for numel in bench.settings.numels:
        x = bench.tensor(numel, torch.bfloat16)
        for K in bench.settings.size_columns:
            bench.time_cases("sizes", [project_case(x, K), update_case(x, K)])
        del x


def calls(bench: Bench) -> None:
    """Time of a call as the host sees it: function, operator, replayed graph; K = 16"""
    for numel in bench.settings.call_numels:
        x = bench.tensor(numel)
        case = project_case(x, 16)
        operator = case.call
        ways: dict[str, Callable[[], object]] = {
            "function": partial(ferret_ext.project, x, SEED, 16),
            "operator": operator,
        }
        if bench.device.type == "cuda":
            ways["graph"] = captured(operator)
        for what, call in ways.items():
            bench.check_time()
            timing = bench.timer.measure_host(call, seconds=bench.settings.seconds)
            row = {"section": "calls", "what": what, "path": case.path, "numel": numel, "K": 16}
            bench.keep(row | {"timing": timing})


def captured(call: Callable[[], object]) -> Callable[[], object]:
    call()  # a kernel must have been loaded before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# In the order of what one would miss most.
SECTIONS = {
    "copy": copy,
    "checks": checks,
    "paths": paths,
    "sizes": sizes,
    "plans": plans,
    "rivals": rivals,
    "from_host": from_host,
    "updates": updates,
    "dtypes": dtypes,
    "columns": columns,
    "bases": bases,
    "calls": calls,
}


def profile(settings: Settings, device: torch.device) -> None:
    """Calls on both paths between marks that a profiler started with --profile-from-start off heeds."""
    x = filled(settings.numel, device=device)
    cases = [project_case(x, 16), project_case(x, 512), update_case(x, 16), update_case(x, 64)]
    call_on_both_paths(cases)
    if device.type != "cuda":
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    call_on_both_paths(cases)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def call_on_both_paths(cases: Sequence[GpuCase]) -> None:
    for path in PATHS:
        with on_path(path):
            for case in cases:
                case.call()


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "device_memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--quick", action="store_true", help="every section on a few small tensors")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--json", type=Path, help="where results go too")
    parser.add_argument(
        "--profile", action="store_true", help="run what a profiler is to see, and time nothing"
    )
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    if arguments.device.type == "cuda":  # events and graphs are the current device's
        torch.cuda.set_device(arguments.device.index or 0)
    if arguments.profile:
        return profile(settings, arguments.device)
    facts = device_facts(arguments.device)
    print(json.dumps(facts))
    bench = Bench(settings, arguments.device, arguments.budget)

    def save() -> None:
        if arguments.json is not None:
            write(arguments.json, bench.rows, notes=bench.notes, **facts)

    bench.run(arguments.only, save)
    for note in bench.notes:
        print(f"left out: {note}")
    return None


if __name__ == "__main__":
    main()
