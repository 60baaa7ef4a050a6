"""What bench_gpu.py times: the operators themselves, because the Python functions wait for their result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from cases import SEED, Case, filled, make_plan, name_of
from torch import Tensor

from ferret_ext import BlockPlan, Packing, project_difference
from ferret_ext.checks import KINDS
from ferret_ext.ops import Basis

_ops: Any = torch.ops.ferret
PATHS = ("mma", "simt")  # of the kernels; the first is the default


@dataclass(frozen=True)
class GpuCase(Case):
    """A case of `clients` updates, so of clients times as many basis elements."""

    clients: int = 1

    @property
    def elements(self) -> float:
        return self.numel * self.K * self.clients

    @property
    def path(self) -> str:
        """The kernels that a call takes now, which csrc/cuda/path.h chooses at every call."""
        if self.what == "basis" or self.basis != "rademacher" or self.dtype == "float64":
            return "simt"
        return os.environ.get("FERRET_CUDA_PATH") or PATHS[0]


def small_gammas(clients: int, K: int, x: Tensor) -> Tensor:
    """So small that a parameter keeps its size over any number of calls."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((clients, K), 1e-6, dtype=wide, device=x.device)


def project_case(x: Tensor, K: int, basis: Basis = "rademacher") -> GpuCase:
    call = partial(_ops.project, x, SEED, K, KINDS[basis], 0, x.numel())
    return GpuCase("project", call, x.numel(), K, x.nbytes, 0, basis, name_of(x.dtype))


def reconstruct_case(x: Tensor, K: int, basis: Basis = "rademacher") -> GpuCase:
    """Into new memory, which the allocator keeps at hand."""
    gamma = small_gammas(1, K, x)[0]
    call = partial(_ops.reconstruct, gamma, SEED, x.numel(), KINDS[basis], 0, x.numel(), x.dtype)
    return GpuCase("reconstruct", call, x.numel(), K, 0, x.nbytes, basis, name_of(x.dtype))


def update_case(x: Tensor, K: int, basis: Basis = "rademacher") -> GpuCase:
    blocks, pieces = torch.tensor([[0, x.numel(), K, 0]]), torch.tensor([[0, 0, x.numel(), 0, 0]])
    arguments = blocks, pieces, small_gammas(1, K, x), [SEED], [1.0], 1.0, KINDS[basis]
    call = partial(_ops.apply_blocks_, [x], *arguments)
    return GpuCase("reconstruct_", call, x.numel(), K, x.nbytes, x.nbytes, basis, name_of(x.dtype))


def rounding_case(x: Tensor, K: int) -> GpuCase:
    """reconstruct_ into 16-bit parameters, rounded at random."""
    case = update_case(x, K)
    call = partial(cast(Any, case.call), rounding_seed=3)
    return replace(case, what="reconstruct_, by chance", call=call)


def packed_case(x: Tensor, K: int) -> GpuCase:
    """reconstruct_ from codes that choose the largest of 256 candidates, a sign each."""
    packing = Packing(bits=1, choice=8)
    blocks, pieces = torch.tensor([[0, x.numel(), K, 0]]), torch.tensor([[0, 0, x.numel(), 0, 0]])
    codes = torch.full((1, packing.code_bytes(K)), 0x5A, dtype=torch.uint8, device=x.device)
    scales = torch.full((1, 1), 1e-6, device=x.device)
    arguments = blocks, pieces, K, codes, scales, packing.bits, packing.choice, [SEED], [1.0], 1.0
    call = partial(_ops.apply_packed_, [x], *arguments, KINDS["rademacher"])
    return GpuCase("apply_ of codes", call, x.numel(), K, x.nbytes, x.nbytes, "rademacher", name_of(x.dtype))


def host_difference_case(old: Tensor, new: Tensor, blocks: int) -> GpuCase:
    """project_difference of equal blocks with 4 coordinates each, `old` in host memory."""
    plan = make_plan([new.numel() // blocks] * blocks, [4] * blocks)
    old_parts, new_parts = (torch.split(x, new.numel() // blocks) for x in (old, new))
    call = partial(project_difference, plan, old_parts[:blocks], new_parts[:blocks], SEED)
    numel, K = size_of(plan)
    read = 2 * new.element_size() * numel
    return GpuCase("project_difference", call, numel, K, read, 0, "rademacher", name_of(new.dtype))


def basis_case(x: Tensor, basis: Basis) -> GpuCase:
    out = torch.empty_like(x)
    call = partial(_ops.basis_, out, SEED, 5, KINDS[basis], 0, x.numel())
    return GpuCase("basis", call, x.numel(), 1, 0, x.nbytes, basis, name_of(x.dtype))


def plan_cases(
    numels: Sequence[int], columns: Sequence[int], dtype: torch.dtype, device: torch.device, clients: int
) -> list[GpuCase]:
    """project_difference, apply_ of one and of several updates; a tensor and block of each length and K."""
    plan = make_plan(numels, columns)
    new = [part.clone() for part in torch.split(filled(sum(numels), dtype, device), list(numels))]
    old = [part.neg() for part in new]
    cases = [difference_case(plan, old, new)]
    return cases + [apply_case(plan, new, count) for count in sorted({1, clients})]


def difference_case(plan: BlockPlan, old: list[Tensor], new: list[Tensor]) -> GpuCase:
    numel, K = size_of(plan)
    arguments = plan.blocks_table, plan.pieces_table, plan.K, SEED, KINDS["rademacher"]
    call = partial(_ops.project_blocks, new, old, *arguments)
    read = sum(x.nbytes for x in [*old, *new])
    return GpuCase("project_difference", call, numel, K, read, 0, "rademacher", name_of(new[0].dtype))


def apply_case(plan: BlockPlan, params: list[Tensor], clients: int) -> GpuCase:
    numel, K = size_of(plan)
    gammas, seeds, weights = small_gammas(clients, plan.K, params[0]), [*range(clients)], [1.0] * clients
    tables = plan.blocks_table, plan.pieces_table
    call = partial(_ops.apply_blocks_, params, *tables, gammas, seeds, weights, 1.0, KINDS["rademacher"])
    size = sum(x.nbytes for x in params)
    dtype = name_of(params[0].dtype)
    return GpuCase(f"apply_, N = {clients}", call, numel, K, size, size, "rademacher", dtype, clients)


def size_of(plan: BlockPlan) -> tuple[int, float]:
    """Elements, and K_l averaged over them."""
    numel = sum(block.numel for block in plan.blocks)
    return numel, sum(block.numel * block.k for block in plan.blocks) / numel


def llama_7b() -> list[int]:
    """The lengths of the 291 parameters of Llama 2 7B."""
    hidden, inner, vocabulary = 4096, 11008, 32000
    layer = [hidden * hidden] * 4 + [hidden * inner] * 3 + [hidden] * 2
    return [vocabulary * hidden, *(layer * 32), hidden, vocabulary * hidden]


def by_size(numels: Sequence[int], K: int) -> list[int]:
    """K_l in proportion to the length, at least 1; their sum is K to rounding."""
    return [max(1, round(K * numel / sum(numels))) for numel in numels]
