"""Rates of project and of the in-place apply on the CPU, beside yardsticks and rivals of the same run.

    python benchmarks/bench_cpu.py --json FILE [--quick] [--threads 1 2] [--isa avx2] [--only SECTION ..]

The unit is a basis element: one of the d K numbers of V, each generated once and used once. A rate is that of
the median call, beside those of the slowest and the fastest. Shares are of yardsticks (yardsticks.py), which
are measured on as many threads and, but for philox, on an array of as many bytes, beyond the caches the same:

- philox: random words that the basis takes (a rademacher element 1/32 of a word, a uniform one 1/4, a
  gaussian one 1) over those that the generator makes when it has nothing else to do.
- read: bytes of tensors that are read over those of a plain read. What is written does not count here.
- update: bytes that are written in place over those that a plain x += 1 writes.

What is compared is timed in turns. Rivals (rivals.py) run on one thread, scikit-learn's only where it is
installed. plot_cpu.py draws the scaling.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's rivals get the one core that ours has

import torch
from cases import SEED, Case, both_cases, filled, log_uniform, plan_cases, project_case
from rivals import rivals, scikit_learn_fit, scikit_learn_transform
from timer import last_level_cache, measure, measure_in_turns, memory_available, processor, write
from yardsticks import Yardsticks

import ferret_ext

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured; the defaults take some minutes. Lengths are in elements."""

    seconds: float = 0.5  # of timed calls a row
    numel: int = 4_000_000
    columns: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)
    few_columns: tuple[int, ...] = (1, 16, 64, 1024)
    basis_numel: int = 1_000_000
    memory_numel: int = 1 << 28
    memory_columns: tuple[int, ...] = (1, 2, 4, 8)
    plan_blocks: int = 300
    rival_numel: int = 1_000_000
    rival_columns: tuple[int, ...] = (16, 64)
    scaling_numels: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
    scaling_columns: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    scaling_call: float = 2.0  # seconds that one call may take


QUICK = Settings(
    seconds=0.1,
    columns=(1, 4, 16, 64, 1024),
    few_columns=(1, 64),
    memory_columns=(1, 8),
    rival_columns=(16,),
    scaling_numels=(10**4, 10**6, 10**8),
    scaling_columns=(1, 16, 256, 4096),
    scaling_call=0.5,
)


class Bench:
    """Times cases, prints and keeps a row for each."""

    def __init__(self, settings: Settings, threads: Sequence[int]) -> None:
        self.settings = settings
        self.threads = threads
        self.yardsticks = Yardsticks(settings.seconds / 2)
        self.rows: list[Row] = []

    def compare(self, section: str, cases: Sequence[Case], threads: Sequence[int], to: str = "") -> None:
        """A row for every case on every number of threads, with ratios to the first number of threads and to
        the first case, which is called `to`."""
        runs = [(case, count) for case in cases for count in threads]
        calls = [partial(on_threads, count, case.call) for case, count in runs]
        timings = measure_in_turns(calls, seconds=self.settings.seconds)
        rates = {run: run[0].elements / timing.median for run, timing in zip(runs, timings, strict=True)}
        for (case, count), timing in zip(runs, timings, strict=True):
            ratios = {}
            if count != threads[0]:
                ratios[f"{threads[0]} thread"] = rates[case, count] / rates[case, threads[0]]
            if case is not cases[0]:
                ratios[to] = rates[case, count] / rates[cases[0], count]
            self.keep(
                {
                    "section": section,
                    "what": case.what,
                    "basis": case.basis,
                    "dtype": case.dtype,
                    "numel": case.numel,
                    "K": case.K,
                    "threads": count,
                    "rate": rates[case, count],
                    "timing": timing,
                    "shares": self.shares(case, count, timing.median),
                    "ratios": ratios,
                }
            )

    def shares(self, case: Case, threads: int, seconds: float) -> dict[str, float]:
        """Nothing for a rival."""
        shares = {}
        if case.bytes_read:
            read = self.yardsticks("read", threads, case.bytes_read)
            shares["philox"] = case.words / seconds / self.yardsticks("philox", threads)
            shares["read"] = case.bytes_read / seconds / read
        if case.bytes_written:
            update = self.yardsticks("update", threads, case.bytes_written)
            shares["update"] = case.bytes_written / seconds / update
        return shares

    def keep(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)


def on_threads(count: int, call: Callable[[], object]) -> None:
    torch.set_num_threads(count)
    call()


def heading(title: str) -> None:
    print(f"\n{title}")
    print(f"{'':32} {'d':>11} {'K':>6} thr {'G/s':>8} slowest .. fastest philox   read update  ratios")


def line(row: Row) -> str:
    timing, work = row["timing"], row["rate"] * row["timing"].median / 1e9
    name = " ".join([row["what"], *(row[key] for key in ("basis", "dtype") if row[key] not in USUAL)])
    shares = [f"{row['shares'][key]:6.0%}" if key in row["shares"] else " " * 6 for key in SHARES]
    ratios = ", ".join(f"{times(ratio)} x {to}" for to, ratio in row["ratios"].items())
    return (
        f"{name:32} {row['numel']:>11,} {row['K']:>6.4g} {row['threads']:>3} {row['rate'] / 1e9:8.3g} "
        f"{work / timing.slowest:>7.3g} .. {work / timing.fastest:<7.3g} {' '.join(shares)}  {ratios}"
    ).rstrip()


def times(ratio: float) -> str:
    """A small ratio as one over a large one."""
    return f"{ratio:.2f}" if ratio > 0.5 else f"1/{1 / ratio:.1f}"


USUAL = ("rademacher", "float32", "")
SHARES = ("philox", "read", "update")


# ---- sections ----


def columns(bench: Bench) -> None:
    """K from 1 to 1024."""
    x = filled(bench.settings.numel)
    heading(f"Every K, {x.nbytes / 1e6:.0f} MB")
    for K in bench.settings.columns:
        for case in both_cases(x, K):
            bench.compare("columns", [case], bench.threads)


def dtypes(bench: Bench) -> None:
    """16-bit tensors beside float32."""
    heading("16-bit tensors")
    tensors = [filled(bench.settings.numel, t) for t in (torch.float32, torch.bfloat16, torch.float16)]
    for K in bench.settings.few_columns:
        for cases in zip(*(both_cases(x, K) for x in tensors), strict=True):
            bench.compare("dtypes", cases, bench.threads, to="float32")


def bases(bench: Bench) -> None:
    """The other two bases."""
    x = filled(bench.settings.basis_numel)
    heading("Other bases")
    for basis in ("uniform", "gaussian"):
        for K in bench.settings.few_columns:
            for case in both_cases(x, K, basis):
                bench.compare("bases", [case], bench.threads)


def memory(bench: Bench) -> None:
    """Small K on a tensor that no cache holds."""
    size, available = 4 * bench.settings.memory_numel, memory_available()
    heading(f"Small K, {size / 1e9:.2f} GB, with {last_level_cache() / 1e9:.2f} GB of cache")
    if size > available / 2:
        print(f"left out: {available / 1e9:.1f} GB of memory are available")
        return
    x = filled(bench.settings.memory_numel)
    bench.yardsticks.use(x)
    for K in bench.settings.memory_columns:
        for case in both_cases(x, K):
            bench.compare("memory", [case], bench.threads)


def plans(bench: Bench) -> None:
    """Many blocks of mixed size beside one as large, of the same average K."""
    count = bench.settings.plan_blocks
    heading(
        f"Plans of {count} blocks of 128 to 1,000,000 elements, with K = 64 and with K from 8 to 512 each"
    )
    numels = log_uniform(128, 1_000_000, count, seed=0)
    for columns in ([64] * count, log_uniform(8, 512, count, seed=1)):
        plan = plan_cases(numels, columns)
        one_block = plan_cases([sum(numels)], [round(plan[0].K)])
        for cases in zip(one_block, plan, strict=True):
            bench.compare("plans", cases, bench.threads, to="one block")


def paths(bench: Bench) -> None:
    """Every path that the processor can run, by turns: ratios hold where a shared machine's rates do not."""
    heading("project on every vector path, ratios to the path in use")
    used = ferret_ext.cpu_capability()["isa"]
    vector = [isa for isa in ferret_ext.cpu_capability()["available"] if isa not in ("scalar", used)]
    tensors = {bench.settings.numel: bench.settings.columns}
    if 8 * bench.settings.memory_numel < memory_available():
        tensors[bench.settings.memory_numel] = bench.settings.memory_columns
    cases = [project_case(x, K) for x in map(filled, tensors) for K in tensors[x.numel()]]
    x = filled(bench.settings.basis_numel)
    cases += [project_case(x, K, "uniform") for K in bench.settings.few_columns]
    for case in cases:
        by_path = [
            replace(case, what=f"project, {isa}", call=partial(on_path, isa, case.call))
            for isa in (used, *vector)
        ]
        bench.compare("paths", by_path, bench.threads[:1], to=used)
    ferret_ext.set_cpu_isa(used)


def on_path(isa: str, call: Callable[[], object]) -> None:
    ferret_ext.set_cpu_isa(isa)
    call()


def others(bench: Bench) -> None:
    """What else one could use, on one thread."""
    heading("Rivals, on one thread")
    delta = filled(bench.settings.rival_numel)
    calls = rivals()
    if "scikit-learn" not in calls:
        print("scikit-learn is not installed: its rows are left out")
    for K in bench.settings.rival_columns:
        cases = [project_case(delta, K)]
        cases += [
            Case(f"rival: {name}", partial(call, delta, SEED, K), delta.numel(), K)
            for name, call in calls.items()
        ]
        if "scikit-learn" in calls:
            transform = partial(scikit_learn_transform, delta, scikit_learn_fit(delta, SEED, K))
            cases.append(Case("rival: scikit-learn, V stored", transform, delta.numel(), K))
        bench.compare("rivals", cases, [1], to="project")


def scaling(bench: Bench) -> None:
    """A table over d and K, and the yardsticks that bound it."""
    settings = bench.settings
    limit = f"-: more than {settings.scaling_call:g} s a call or half of the memory"
    fitting = [d for d in settings.scaling_numels if 4 * d < memory_available() / 2]
    x = filled(max(fitting))
    for threads in bench.threads:
        torch.set_num_threads(threads)
        for index, what in enumerate(("project", "reconstruct_")):
            print(f"\n{what} in G/s on {threads} threads ({limit})")
            print(f"{'d':>14}" + "".join(f"{f'K = {K}':>10}" for K in settings.scaling_columns))
            rates = dict.fromkeys(settings.scaling_columns, math.inf)  # at the d before
            for d in settings.scaling_numels:
                print(f"{d:>14,}", end="")
                for K in settings.scaling_columns:
                    timing = None
                    if d in fitting and d * K / rates[K] <= settings.scaling_call:
                        timing = measure(
                            both_cases(x[:d], K)[index].call, seconds=settings.seconds / 3, least=2
                        )
                        rates[K] = d * K / timing.median
                    rate = None if timing is None else rates[K]
                    print(f"{'-' if rate is None else f'{rate / 1e9:.3g}':>10}", end="", flush=True)
                    row = {"section": "scaling", "what": what, "numel": d, "K": K, "threads": threads}
                    bench.rows.append(row | {"rate": rate, "timing": timing})
                print()
        bench.yardsticks("philox", threads)
        for yardstick in ("read", "update"):
            bench.yardsticks(yardstick, threads, 4 * min(settings.memory_numel, max(fitting)))


SECTIONS = {
    "columns": columns,
    "dtypes": dtypes,
    "bases": bases,
    "memory": memory,
    "paths": paths,
    "plans": plans,
    "rivals": others,
    "scaling": scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rows: about a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="ratios are to the first")
    parser.add_argument("--isa", help="the CPU path, by default the best one")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--json", type=Path, help="where results go too")
    arguments = parser.parse_args()
    if arguments.isa is not None:
        os.environ["FERRET_CPU_ISA"] = arguments.isa

    begin = time.perf_counter()
    isa = ferret_ext.cpu_capability()["isa"]
    print(f"{processor()}, path {isa}, torch {torch.__version__}")
    bench = Bench(QUICK if arguments.quick else Settings(), arguments.threads)
    for section in arguments.only:
        SECTIONS[section](bench)
    print(f"\nYardsticks\n{bench.yardsticks.table()}\n\n{time.perf_counter() - begin:.0f} s")
    if arguments.json is not None:
        write(arguments.json, [*bench.yardsticks.rows, *bench.rows], isa=isa, threads=arguments.threads)


if __name__ == "__main__":
    main()
