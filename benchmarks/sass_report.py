"""What the CUDA kernels cost, read from their machine code: no GPU is needed, and nothing here is timed.

    python benchmarks/sass_report.py OBJECT .. [--json FILE]

OBJECT is what nvcc made of a .cu file; `make cuda-build` leaves them in build/. For every kernel and
architecture the table has the instructions that a basis element costs in the inner loops, by pipe, and for
sm_90 the elements/s that an H200 could do if its busiest pipe were the only limit.

Rules, for code that nobody has annotated:

- A loop is what lies between a backward branch and its target; an inner loop has no other loop in it.
- A Philox call is 20 multiplications by its two constants; some may have been moved out of the loop. A call
  makes as many elements as its kind's bits allow (docs/streams.md).
- Integer matrix products take what the calls of their loop make. Elsewhere an IMAD.WIDE of two registers
  adds one element (and limb, in float64).
- The loop with most calls counts. Where elements are added in another loop, that with most additions too.
- Code that is skipped in an iteration, or lies outside of its loop, is not told apart.

For kernels of the matrix units there is also what an element of a tensor costs with K columns, everything
included (sass_paths.py), and the share of an H200's copy bandwidth that this allows.

cuobjdump and nvdisasm come with the CUDA toolkit or with the triton wheel, which a CUDA torch brings along.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from sass import Instruction, Kernel, parse
from sass_paths import Done, cheapest_way
from timer import commit

# ---- an H200 ----

CLOCK = 1.98e9
MULTIPROCESSORS = 132
COPY_BANDWIDTH = 4.3e12  # bytes read and written a second, estimated: nine tenths of the data sheet's 4.8e12

# Instructions of threads a clock and multiprocessor: (at least, at most). CUDA C++ Programming Guide,
# "Throughput of native arithmetic instructions", compute capability 9.0. Two are not told there: whether
# IMAD.WIDE runs at half of IMAD's rate, and how much of the matrix units' rate (1979e12 int8 operations/s,
# data sheet) mma.sync gets. Shared memory gives 32 words a clock, and what several threads read counts once;
# how often they do so is not told apart.
RATES: dict[str, tuple[float, float]] = {
    "issue": (128, 128),
    "IMAD.WIDE": (32, 64),
    "IMAD": (64, 64),
    "ALU": (64, 64),
    "FMA": (128, 128),
    "FP64": (64, 64),
    "XU": (16, 16),
    "shared": (32, 32),
    "shared words": (32, inf),
    "MMA": (16, 32),
}


# ---- what an element costs ----

ELEMENTS_OF_CALL = {1: 128, 2: 16, 3: 4}  # rademacher, uniform, gaussian
KINDS = {1: "rademacher", 2: "uniform", 3: "gaussian"}


@dataclass(frozen=True)
class Loop:
    """Instructions of an iteration, and the basis elements that a thread makes or adds in it."""

    role: str
    begin: int
    elements: float
    pipes: Counter[str]
    words: int  # of shared memory

    @property
    def per_element(self) -> dict[str, float]:
        return {pipe: count / self.elements for pipe, count in self.pipes.items()}


def kind_of(kernel: Kernel) -> int:
    """The basis that a kernel is compiled for; kernels of the matrix units know rademacher only."""
    match = re.search(r"BasisE(\d)", kernel.name)
    return int(match[1]) if match else 1


def limbs_of(kernel: Kernel) -> int:
    return 2 if re.search(r"BasisE\dEd", kernel.name) else 1


def hot_loops(kernel: Kernel) -> list[Loop]:
    """None where a kernel makes no elements in a loop."""
    loops = kernel.inner_loops()
    if not loops:
        return []
    words = max(loops, key=lambda loop: sum(i.multiplies_in_philox for i in loop))
    calls = round(sum(i.multiplies_in_philox for i in words) / 20)
    if calls == 0:
        return []
    made = float(calls * ELEMENTS_OF_CALL[kind_of(kernel)])
    adding = max(loops, key=additions)
    together = any(i.pipe == "MMA" for i in words) or adding == words
    result = [loop_of("words and sums" if together else "words", words, made)]
    if not together and additions(adding):
        result.append(loop_of("sums", adding, additions(adding) / limbs_of(kernel)))
    return result


def loop_of(role: str, code: tuple[Instruction, ...], elements: float) -> Loop:
    return Loop(role, code[0].address, elements, pipes(code), shared_words(code))


def additions(loop: tuple[Instruction, ...]) -> int:
    return sum(i.accumulates for i in loop)


def pipes(loop: tuple[Instruction, ...]) -> Counter[str]:
    return Counter(i.pipe for i in loop)


def shared_words(loop: tuple[Instruction, ...]) -> int:
    """32-bit words of a thread's accesses: LDS.128 has four."""
    bits = [re.search(r"\.(64|128)", i.opcode) for i in loop if i.pipe == "shared"]
    return sum(int(match[1]) // 32 if match else 1 for match in bits)


def bounds(per_element: dict[str, float], words: float) -> dict[str, tuple[float, float]]:
    """Elements/s that each pipe allows: (at least, at most)."""
    needed = per_element | {"issue": sum(per_element.values()), "shared words": words}
    clocks = CLOCK * MULTIPROCESSORS
    return {
        pipe: (low * clocks / needed[pipe], high * clocks / needed[pipe])
        for pipe, (low, high) in RATES.items()
        if needed.get(pipe)
    }


def row(kernel: Kernel) -> dict[str, Any] | None:
    loops = hot_loops(kernel)
    if not loops:
        return None
    pipes_of_loops = {pipe for loop in loops for pipe in loop.pipes}
    total = {pipe: sum(loop.per_element.get(pipe, 0.0) for loop in loops) for pipe in pipes_of_loops}
    by_pipe = bounds(total, sum(loop.words / loop.elements for loop in loops))
    low, high = (min(by_pipe, key=lambda pipe: by_pipe[pipe][end]) for end in (0, 1))
    bound = [by_pipe[low][0], by_pipe[high][1]]
    return {
        "kernel": readable(kernel),
        "architecture": kernel.architecture,
        "instructions": sum(total.values()),
        "pipes": dict(sorted(total.items())),
        "loops": [
            {"role": x.role, "address": x.begin, "elements": x.elements, "instructions": x.pipes.total()}
            for x in loops
        ],
        "tiles": tile_rows(kernel, loops[0].begin),
    } | ({"bound": bound, "limits": [low, high]} if of_h200(kernel) else {})


@dataclass(frozen=True)
class Work:
    """What a thread does on one way round a kernel's loop over tiles."""

    elements: int  # of tensors
    run: int  # of them, read or written at a time
    columns: int  # of one pass of the inner loop
    fused: int  # multiply-adds of an element, outside of sums over columns
    writes: bool
    shown: tuple[int, ...]  # K

    def done(self, passes: int) -> Done:
        return self.elements, self.elements if self.writes else 0, self.fused * self.elements, passes


WORK = {
    "project_matrix_kernel": Work(16, 16, 16, 1, writes=False, shown=(16, 64, 512)),
    "apply_matrix_kernel<16>": Work(32, 32, 16, 2, writes=True, shown=(16,)),
    "apply_matrix_kernel<64>": Work(16, 16, 64, 3, writes=True, shown=(64, 512)),
}


def of_h200(kernel: Kernel) -> bool:
    return kernel.architecture.startswith("sm_90")


def tile_rows(kernel: Kernel, inner: int) -> list[dict[str, Any]]:
    """Float32 and 16-bit tensors."""
    name = readable(kernel)
    if name not in WORK or not of_h200(kernel):
        return []
    work, rows = WORK[name], []
    for dtype, size in (("float32", 4), ("16 bits", 2)):
        once, twice = (cheapest_way(kernel, inner, size, work.run, work.done(n)) for n in (1, 2))
        if once is None or twice is None:
            sys.exit(f"{name} ({kernel.architecture}): expected a way round for {dtype}, found none")
        for columns in work.shown:
            more = columns // work.columns - 1  # passes, each as long as a second one
            way = {
                pipe: pipes(once)[pipe] + more * (n - pipes(once)[pipe]) for pipe, n in pipes(twice).items()
            }
            words = shared_words(once) + more * (shared_words(twice) - shared_words(once))
            per_element = {pipe: count / work.elements for pipe, count in way.items()}
            by_pipe = bounds(per_element, words / work.elements)
            elements = min(low for low, _ in by_pipe.values())
            bandwidth = size * (2 if work.writes else 1) * elements
            facts = {"instructions": sum(per_element.values()), "pipes": per_element}
            shares = {"bandwidth": bandwidth, "share_of_copy": bandwidth / COPY_BANDWIDTH}
            limit = min(by_pipe, key=lambda pipe: by_pipe[pipe][0])
            rates = {"basis_elements": columns * elements, "limit": limit}
            rows.append({"dtype": dtype, "K": columns} | facts | shares | rates)
    return rows


def readable(kernel: Kernel) -> str:
    names = [name for name in parts_of(kernel.name) if name.endswith("_kernel")]
    name = (names or [kernel.name])[-1]
    if not re.search(r"BasisE\d", kernel.name):
        columns = re.search(r"_kernelILi(\d+)E", kernel.name)
        return f"{name}<{columns[1]}>" if columns else name
    return f"{name}<{KINDS[kind_of(kernel)]}, {'double' if limbs_of(kernel) == 2 else 'float'}>"


def parts_of(mangled: str) -> list[str]:
    """The names that a mangled name is made of, each behind its length."""
    names, at = [], 0
    while match := re.compile(r"\d+").search(mangled, at):
        length = int(match[0])
        names.append(mangled[match.end() : match.end() + length])
        at = match.end() + (length if re.match(r"[A-Za-z_]\w*$", names[-1]) else 0)
    return names


# ---- table ----

SHOWN = ("IMAD.WIDE", "IMAD", "ALU", "FMA", "XU", "shared", "MMA", "other")


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'kernel':46} {'arch':>7} {'all':>6} " + " ".join(f"{pipe:>9}" for pipe in SHOWN)
    lines = [
        "Instructions of a basis element, and elements/s of an H200 (computed)",
        head + "  bound, 1e12/s",
    ]
    for x in sorted(rows, key=lambda x: (x["architecture"], x["kernel"])):
        counts = " ".join(f"{x['pipes'].get(pipe, 0):9.3f}" for pipe in SHOWN)
        lines.append(f"{x['kernel']:46} {x['architecture']:>7} {x['instructions']:6.2f} {counts}")
        if "bound" in x:
            low, high = (f"{value / 1e12:.2g}" for value in x["bound"])
            lines[-1] += f"  {low} to {high} by {' or '.join(dict.fromkeys(x['limits']))}"
    lines += ["", "Instructions of a tensor's element with K columns, everything included (computed)"]
    for x in rows:
        lines += [tile_line(x, tile) for tile in x["tiles"]]
    return "\n".join(lines)


def tile_line(row: dict[str, Any], tile: dict[str, Any]) -> str:
    text = f"{row['kernel']:46} {row['architecture']:>7} {tile['instructions']:6.2f}"
    text += f"  K = {tile['K']}, {tile['dtype']}: {tile['bandwidth'] / 1e12:.2g}e12 bytes/s"
    text += f", {tile['share_of_copy']:.0%} of copying"
    return f"{text}, {tile['basis_elements'] / 1e12:.2g}e12 basis elements/s, by {tile['limit']}"


# ---- tools ----


def tool_folders() -> list[Path]:
    """Where the toolkit and triton keep their programs."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home) / "bin" for home in [*homes, "/usr/local/cuda"]]
    spec = importlib.util.find_spec("triton")
    for place in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(path.parent for path in Path(place).rglob("cuobjdump"))
    return folders


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), *map(str, tool_folders())])


def compiler() -> str:
    """nvcc's version, as it says it of itself."""
    program = shutil.which("nvcc", path=search_path())
    run = subprocess.run([program, "--version"], capture_output=True, text=True) if program else None
    return run.stdout.splitlines()[-2] if run and run.stdout else "unknown"


def disassemble(objects: list[Path]) -> str:
    """`cuobjdump -sass`, which calls nvdisasm."""
    path = search_path()
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if shutil.which(tool, path=path) is None]
    if missing:
        sys.exit(
            f"{' and '.join(missing)}: expected in PATH, CUDA_HOME/bin or the triton wheel, got none;"
            " pip install triton brings them"
        )
    program = str(shutil.which("cuobjdump", path=path))
    runs = [
        subprocess.run(
            [program, "-sass", str(x)], capture_output=True, text=True, env=os.environ | {"PATH": path}
        )
        for x in objects
    ]
    for x, run in zip(objects, runs, strict=True):
        if run.returncode != 0 or not run.stdout:
            sys.exit(f"{x}: expected an object file with code for GPUs, got: {run.stderr.strip()}")
    return "".join(run.stdout for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("objects", nargs="+", type=Path, metavar="OBJECT")
    parser.add_argument("--json", type=Path, help="where results go too")
    arguments = parser.parse_args()
    kernels = parse(disassemble(arguments.objects))
    rows = [x for x in map(row, kernels) if x is not None]
    if not rows:
        sys.exit("expected kernels with loops of Philox calls, got none")
    print(table(rows))
    local = sorted({f"{readable(x)} ({x.architecture})" for x in kernels if pipes(x.code)["local"]})
    if arguments.json is not None:
        facts = {"computed": True, "compiler": compiler(), "commit": commit(), "local_memory": local}
        arguments.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    if local:
        sys.exit(f"local memory, and none is expected, in: {', '.join(local)}")


if __name__ == "__main__":
    main()
