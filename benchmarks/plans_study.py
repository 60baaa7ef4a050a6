"""One block a tensor beside the plan auto, at equal bytes.

    python benchmarks/plans_study.py --model FOLDER --data FOLDER --json FILE

Closed forms of the error of an update out of training on GSM8K, seconds of the processor for its projection,
and the work alone for a Llama of 1.1 billion parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from bench_round import SHAPES, llama
from quality import SCALES, Form, first_update, predicted
from timer import write

import ferret_ext
from ferret_ext import BlockPlan
from ferret_ext.federated.algorithms.ferret import first_plan
from ferret_ext.federated.config import Coordinates, FerretConfig
from ferret_ext.federated.coordinates import PACKINGS

Named = list[tuple[str, torch.Tensor]]
SMALL, LARGE = "260K", "1.1B"
SIZES = {SMALL: (128, 256, 512, 1024, 4096, 32768), LARGE: (1024, 4096, 16384, 65536, 1 << 20)}
KIND: Coordinates = "choice8"


@dataclass(frozen=True)
class Shapes:
    """What a plan looks at of a model."""

    named: Named

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.named)


def shapes_of(named: Sequence[tuple[str, torch.Tensor]]) -> Shapes:
    return Shapes([(name, torch.empty(it.shape, device="meta", requires_grad=True)) for name, it in named])


def plan_of(size: int, granularity: Any, model: Shapes) -> BlockPlan | None:
    """The plan of so many bytes; None where there are fewer coordinates than tensors."""
    form = Form("", KIND, "curvature", size, 1.0, granularity=granularity)
    K = form.fitted(model)
    try:
        return first_plan(FerretConfig(K=max(K, 1), coordinates=KIND, granularity=granularity), model)
    except ValueError:
        return None


def plan_rows(
    model: str, named: Sequence[tuple[str, torch.Tensor]], update: list[torch.Tensor] | None
) -> Iterator[dict[str, Any]]:
    """A row a number of bytes and plan; update: None where only shapes are known."""
    shapes = shapes_of(named)
    for size in SIZES[model]:
        for granularity in ("tensor", "auto"):
            row = {"model": model, "bytes": size, "granularity": granularity}
            plan = plan_of(size, granularity, shapes)
            yield row if plan is None else {**row, **told(plan), **(measured(plan, update) if update else {})}


def told(plan: BlockPlan) -> dict[str, Any]:
    """columns: basis elements that a projection takes, those of candidates included."""
    packing = PACKINGS[KIND]
    return {
        "K": plan.K,
        "L": len(plan.blocks),
        "sent": packing.code_bytes(plan.K) + len(plan.blocks) + SCALES,
        "columns": sum(block.numel * block.k for block in plan.blocks) << packing.choice,
    }


def measured(plan: BlockPlan, update: list[torch.Tensor]) -> dict[str, float]:
    """The error in round 1, and later by the norms, with the seconds of a projection then."""
    norms = plan.block_norms(update)
    later = plan.with_allocation("curvature", norms=norms)
    zeros = [torch.zeros_like(part) for part in update]
    full = PACKINGS[KIND].candidates(later)
    seconds = seconds_of(lambda: ferret_ext.project_difference(full, update, zeros, 0), 5)
    return {"first": predicted(plan, norms), "later": predicted(later, norms), "seconds": seconds}


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Of this processor, on average, after one call that is not counted; other programs do not count."""
    call()
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    options.preset, options.set = "small/gsm8k", []
    torch.set_num_threads(1)
    named, update, _ = first_update(options)
    with torch.device("meta"):
        large = list(llama(SHAPES["tinyllama"], torch.device("meta")).named_parameters())
    rows = []
    for row in chain(plan_rows(SMALL, named, update), plan_rows(LARGE, large, None)):
        rows.append(row)
        print(row, flush=True)
    write(options.json, rows)


if __name__ == "__main__":
    main()
