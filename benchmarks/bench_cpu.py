"""Rates of project and reconstruct_ on the CPU, beside what a user could pick instead, in one run.

    python benchmarks/bench_cpu.py [--numel 4000000] [--threads 1] [--isa avx512] [--json FILE]

The unit is a basis element: one of the d K numbers of V, each generated once and used once. The rivals:

- numpy: bits of numpy's Philox, unpacked to +-1, times delta; the fair naive way.
- torch: chunks of torch.randn times delta.
- authors: what Ferret's published code does, written from its description: for every k, reseed torch's
  generator, draw a truncated normal vector, multiply and sum.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's rival gets the one core that ours has

import numpy as np
import torch
from timer import Timing, measure, write
from torch import Tensor

import ferret_ext
from ferret_ext.ops import Basis

COLUMNS = (1, 4, 16, 64, 256, 1024)
BASES: tuple[Basis, ...] = ("uniform", "gaussian")


def numpy_project(delta: Tensor, seed: int, K: int, chunk: int = 1 << 12) -> Tensor:
    """Signs in chunks that stay in the cache; of 2^10 to 2^16 elements this was the fastest."""
    generator = np.random.Philox(seed)
    gamma = np.zeros(K, np.float32)
    values = delta.numpy()
    for begin in range(0, len(values), chunk):
        part = values[begin : begin + chunk]
        words = generator.random_raw(math.ceil(len(part) * K / 64))
        bits = np.unpackbits(words.view(np.uint8))[: len(part) * K].reshape(K, len(part))
        gamma += part.sum() - 2 * (bits.astype(np.float32) @ part)
    return torch.from_numpy(gamma * (math.sqrt(len(values)) / K))


def torch_project(delta: Tensor, seed: int, K: int, chunk: int = 1 << 16) -> Tensor:
    """Normal deviates in chunks."""
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.zeros(K)
    for part in torch.split(delta, chunk):
        gamma += torch.randn(K, part.numel(), generator=generator) @ part
    return gamma * (math.sqrt(delta.numel()) / K)


def authors_project(delta: Tensor, seed: int, K: int) -> Tensor:
    """One whole basis vector after the other."""
    bound = 1 / math.sqrt(delta.numel())
    gamma = torch.empty(K)
    vector = torch.empty_like(delta)
    for k in range(K):
        torch.manual_seed(seed + k)
        torch.nn.init.trunc_normal_(vector, a=-bound, b=bound)
        gamma[k] = (vector * delta).sum()
    return gamma * (3 * delta.numel() / K)


def read_bandwidth(numel: int = 1 << 26) -> float:
    """Bytes a second of a sum over float32, which reads and hardly computes."""
    data = torch.ones(numel)
    return 4 * numel / measure(lambda: data.sum()).median


def row(what: str, numel: int, K: int, timing: Timing) -> dict[str, Any]:
    return {"what": what, "numel": numel, "K": K, "rate": numel * K / timing.median / 1e9, "timing": timing}


def measure_all(numel: int, columns: tuple[int, ...]) -> list[dict[str, Any]]:
    """Ours for every K and basis, the rivals for a few K and as many elements as they do in a second."""
    torch.manual_seed(0)
    delta, param = torch.randn(numel), torch.zeros(numel)
    rows = []

    def add(what: str, n: int, K: int, call: Callable[[], object]) -> None:
        rows.append(row(what, n, K, measure(call, least=3)))
        last = rows[-1]
        spread = (last["timing"].slowest - last["timing"].fastest) / last["timing"].median
        print(f"{what:24} d = {n:>10} K = {K:>5} {last['rate']:9.3f} G/s   spread {spread:6.1%}", flush=True)

    for K in columns:
        gamma = ferret_ext.project(delta, 1, K)
        add("project", numel, K, partial(ferret_ext.project, delta, 1, K))
        add("reconstruct_", numel, K, partial(ferret_ext.reconstruct_, param, gamma, 1))
    few = min(numel, 1_000_000)
    part, target = delta[:few], param[:few]
    for kind in BASES:
        gamma = ferret_ext.project(part, 1, 64, basis=kind)
        add(f"project {kind}", few, 64, partial(ferret_ext.project, part, 1, 64, basis=kind))
        add(f"reconstruct_ {kind}", few, 64, partial(ferret_ext.reconstruct_, target, gamma, 1, basis=kind))
    for K in (16, 64):
        add("rival numpy", few, K, partial(numpy_project, part, 1, K))
        add("rival torch", few, K, partial(torch_project, part, 1, K))
        add("rival authors", few, K, partial(authors_project, part, 1, K))
    return rows


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios of project to the rivals of the same run."""
    rates = {(row["what"], row["K"]): row["rate"] for row in rows}
    return [
        f"project / {rival.removeprefix('rival ')} at K = {K}: {rates['project', K] / rates[rival, K]:.0f} x"
        for K in (16, 64)
        for rival in ("rival numpy", "rival torch", "rival authors")
        if ("project", K) in rates
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=4_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=None, help="the CPU path, by default the best one")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.isa is not None:
        ferret_ext.set_cpu_isa(arguments.isa)

    isa = ferret_ext.cpu_capability()["isa"]
    bandwidth = read_bandwidth()
    print(f"path {isa}, {arguments.threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows = measure_all(arguments.numel, COLUMNS)
    print("\n".join(summary(rows)))
    if arguments.json is not None:
        head = {"what": "read bandwidth", "bytes_per_second": bandwidth, "isa": isa}
        write(arguments.json, [head, *rows])


if __name__ == "__main__":
    main()
