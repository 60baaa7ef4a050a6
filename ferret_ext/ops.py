"""The native operators as Python functions, with fake kernels for torch.compile and with autograd.

The operators themselves (`torch.ops.ferret.*`) are registered by the libraries in `lib/`; this is the only
module that names them. Bad input raises ValueError or TypeError here, before anything is touched.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from . import _native, checks, from_host
from .packing import Packed, Packing
from .plan import AnyPlan, BlockPlan

Basis = Literal["rademacher", "uniform", "gaussian"]
Shape = int | Sequence[int]
Function = TypeVar("Function", bound=Callable[..., Any])

VARIANCE = {1: 1.0, 2: 21845 / 65536, 3: 1.0}  # rho d of each kind


def _load_libraries() -> None:
    """Registers the operators; those for CUDA where torch is a CUDA build, whether or not there is a GPU."""
    folder = Path(__file__).parent / "lib"
    ctypes.CDLL(str(folder / "libferret_ops.so"))
    cuda = folder / "libferret_ops_cuda.so"
    if cuda.exists() and torch.version.cuda is not None:
        ctypes.CDLL(str(cuda))


_load_libraries()
_ops: Any = torch.ops.ferret


def _keep_to_one_thread() -> None:
    """In a forked child: torch's threads are the parent's, and a thread that had called them would hang."""
    if _ops.threads_in_use():
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_keep_to_one_thread)


def project(
    delta: Tensor,
    seed: int,
    K: int,
    *,
    basis: Basis = "rademacher",
    offset: int = 0,
    numel: int | None = None,
) -> Tensor:
    """The coordinates of delta: gamma = 1/(rho K) V^T delta (arXiv 2409.06277, equation 6).

    delta: any shape and strides; float32, bfloat16, float16 or float64.
    seed: in [-2^63, 2^64); names the basis V, d x K, of which nothing is stored.
    K: number of coordinates, in [1, 2^32).
    offset, numel: for a shard, the stream index of its first element (its place in its block) and the
        block's length d; the coordinates of all shards add up to the block's.

    Returns gamma [K] on delta's device, float32, or float64 for a float64 delta; the same bits everywhere.
    Raises ValueError for numbers out of range and for a NaN or infinity in delta, TypeError for a delta that
    is not floating point. Differentiable. On CUDA the check for finite values waits for the result; it is
    left out while a graph is compiled or captured, where a non-finite delta gives NaN coordinates.
    """
    checks.no_tangent("project", "delta", checks.tensor("project", "delta", delta))
    place = checks.place("project", delta.numel(), offset, numel)
    K, kind = checks.columns("project", K), checks.kind("project", basis)
    gamma: Tensor = _ops.project(delta, checks.seed("project", seed), K, kind, *place)
    checks.result("project", gamma, {"delta": delta})
    return gamma


def reconstruct(
    gamma: Tensor,
    seed: int,
    shape: Shape,
    *,
    basis: Basis = "rademacher",
    offset: int = 0,
    numel: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The update rebuilt from its coordinates: V gamma (arXiv 2409.06277, equation 7).

    gamma: [K], floating point.
    shape: of the result, or of the shard at `offset` of a block of `numel` elements.
    dtype, device: of the result; the device is by default gamma's, which is moved there first.

    Returns a tensor of that shape, the same bits everywhere. Raises as `project` does. Differentiable.
    """
    gamma = checks.coordinates("reconstruct", "gamma", gamma)
    checks.no_tangent("reconstruct", "gamma", gamma)
    gamma = gamma if device is None else gamma.to(device)
    size = checks.size("reconstruct", shape)
    count = math.prod(size)
    place = checks.place("reconstruct", count, offset, numel)
    seed, kind = checks.seed("reconstruct", seed), checks.kind("reconstruct", basis)
    checks.dtype("reconstruct", dtype)
    checks.finite("reconstruct", "gamma", gamma)
    rebuilt: Tensor = _ops.reconstruct(gamma, seed, count, kind, *place, dtype)
    return rebuilt.view(size)


def reconstruct_(
    param: Tensor,
    gamma: Tensor,
    seed: int,
    *,
    alpha: float = 1.0,
    basis: Basis = "rademacher",
    offset: int = 0,
    numel: int | None = None,
    rounding_seed: int | None = None,
) -> Tensor:
    """param += alpha V gamma, in one read and one write of param, rounded once to its dtype.

    param: any shape and strides, on gamma's device. rounding_seed: as for `apply_`. Other arguments as for
        `reconstruct`.

    Returns param. Raises as `project` does, and leaves param untouched then. Differentiable: where param or
    gamma requires grad it adds a rebuilt tensor, whose bits differ by the rounding of that tensor.
    """
    checks.tensor("reconstruct_", "param", param)
    gamma = checks.coordinates("reconstruct_", "gamma", gamma)
    checks.no_tangent("reconstruct_", "gamma", gamma)
    checks.one_device("reconstruct_", {"param": param, "gamma": gamma})
    alpha = checks.number("reconstruct_", "alpha", alpha)
    place = checks.place("reconstruct_", param.numel(), offset, numel)
    seed, kind = checks.seed("reconstruct_", seed), checks.kind("reconstruct_", basis)
    rounding = None if rounding_seed is None else checks.seed("reconstruct_", rounding_seed, "rounding_seed")
    checks.finite("reconstruct_", "gamma", gamma)
    if torch.is_grad_enabled() and (param.requires_grad or gamma.requires_grad):
        if rounding is not None:
            raise ValueError("reconstruct_: expected no rounding_seed where param or gamma requires grad")
        rebuilt = _ops.reconstruct(gamma, seed, param.numel(), kind, *place, param.dtype)
        return param.add_(rebuilt.view(param.shape), alpha=alpha)
    checks.may_change("reconstruct_", param)
    checks.separate("reconstruct_", {"param": param})
    blocks = torch.tensor([[*place, gamma.numel(), 0]])
    pieces = torch.tensor([[0, 0, param.numel(), place[0], 0]])[: min(param.numel(), 1)]
    _apply_in_place([param], blocks, pieces, gamma[None], [seed], [1.0], alpha, kind, rounding)
    return param


def basis(
    seed: int,
    k: int,
    shape: Shape,
    *,
    basis: Basis = "rademacher",
    offset: int = 0,
    numel: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Column v_k of the basis with its scale 1/sqrt(d), which the other functions regenerate and never store.

    k: in [0, 2^32). Other arguments and errors as for `reconstruct`.
    """
    out = torch.empty(checks.size("basis", shape), dtype=checks.dtype("basis", dtype), device=device)
    place = checks.place("basis", out.numel(), offset, numel)
    k = checks.integer("basis", "k", k, 0, 2**32 - 1)
    _ops.basis_(out, checks.seed("basis", seed), k, checks.kind("basis", basis), *place)
    return out


def project_difference(
    plan: AnyPlan,
    old: Iterable[Tensor],
    new: Iterable[Tensor],
    seed: int,
    *,
    basis: Basis = "rademacher",
) -> Tensor:
    """The coordinates of old - new for every block of a plan; the difference is never materialised.

    plan: a BlockPlan, or `plan.shard(..)` where a part of each tensor is at hand; coordinates of all parts
        add up to the whole's, to rounding.
    old, new: the plan's tensors in its order, of the same shapes or flat, on one device; dtypes may differ.
        With new on a GPU old may be on the CPU: its blocks are brought over a few at a time, 64 MiB or one
        block, beside the work on those before them, if it is in pinned memory; where a tensor is float64, all
        at once. It must not change before the GPU is done with it.

    Returns the flat gammas [plan.K], float32, or float64 if any tensor is; `plan.split` gives them by block.
    Raises as `project` does. Not differentiable.
    """
    op = "project_difference"
    plan, old, new = checks.plan(op, plan), list(old), list(new)
    olds, news = checks.plan_tensors(op, plan, "old", old), checks.plan_tensors(op, plan, "new", new)
    checks.alike(op, olds, news)
    on_host = news and new[0].is_cuda and old[0].is_cpu
    for together in (olds, news) if on_host else (olds | news,):
        checks.one_device(op, together)
    seed, kind = checks.seed(op, seed), checks.kind(op, basis)
    after = [tensor.detach().contiguous() for tensor in new]
    before = [tensor.detach().contiguous() for tensor in old]

    def operator(now: list[Tensor], then: list[Tensor], blocks: Tensor, pieces: Tensor, K: int) -> Tensor:
        return _ops.project_blocks(now, then, blocks, pieces, K, seed, kind)  # type: ignore[no-any-return]

    if on_host:
        gammas = from_host.project(plan, before, after, operator)
    else:
        gammas = operator(after, before, plan.blocks_table, plan.pieces_table, plan.K)
    checks.result(op, gammas, olds | news)
    return gammas


def pack(plan: BlockPlan, gammas: Tensor, packing: Packing) -> Packed:
    """Coordinates as codes of a few bits, with one scale a block.

    plan: the blocks with the K_l that are sent. gammas: [K 2^choice], as `project_difference` gives them for
        `packing.candidates(plan)`; from another device they are moved to the CPU, where the result is.

    A level is the nearest to the coordinate over a step that goes by the block's root mean square; nothing is
    drawn. The scale keeps the inner product: sum gamma read = sum gamma^2. Over bases the mean reconstruction
    is the update as far as coordinates are normal, which they nearly are for d_l large (docs/quality.md).
    Raises TypeError and ValueError for input that does not fit, and for scales that float32 cannot hold.
    """
    if not isinstance(packing, Packing):
        raise TypeError(f"pack: packing must be a Packing, got {packing!r}")
    checks.plan("pack", plan)
    gammas = checks.coordinates("pack", "gammas", gammas).detach()
    expected = plan.K << packing.choice
    if gammas.numel() != expected:
        raise ValueError(
            f"pack: gammas must be the {expected} of packing.candidates(plan), got {gammas.numel()}"
        )
    checks.finite("pack", "gammas", gammas)
    floats = gammas.to("cpu", torch.float32).contiguous()
    codes, scales = _ops.pack(floats, plan.blocks_table, plan.K, packing.bits, packing.choice)
    checks.finite("pack", "scales", scales)
    return Packed(codes, scales, packing)


def unpack(plan: BlockPlan, packed: Packed) -> tuple[Tensor, Tensor]:
    """(gammas float32 [K], columns int64 [K]): the coordinates read from codes, and the column of its block's
    basis that each belongs to, which without a choice is its place in the block. On the CPU.

    Raises ValueError for codes or scales that do not fit the plan.
    """
    checks.packed("unpack", "packed", plan, packed)
    codes, scales = packed.codes.cpu().contiguous(), packed.scales.cpu().contiguous()
    bits, choice = packed.packing.bits, packed.packing.choice
    return _ops.unpack(codes[None], scales[None], plan.blocks_table, plan.K, bits, choice)  # type: ignore[no-any-return]


def apply_(
    plan: AnyPlan,
    params: Iterable[Tensor],
    updates: Iterable[tuple[int, Tensor | Packed, float]],
    alpha: float,
    *,
    basis: Basis = "rademacher",
    rounding_seed: int | None = None,
) -> None:
    """params += alpha sum_i weight_i V_i gamma_i, each parameter read and written once for all updates.

    plan: a BlockPlan, or `plan.shard(..)`: parts get the bits that they have in the whole.
    params: the plan's tensors in its order, on one device with the gammas.
    updates: (seed, gammas [plan.K], weight) of each client, the gammas as tensors, or all of them packed
        alike, which without a choice gives the same bits as the floats they stand for.
    rounding_seed: bfloat16 and float16 parameters are rounded up or down by chance, so that the mean over
        seeds is the unrounded result and small steps are not lost; another for each call, in [-2^63, 2^64).
        The seed and an element's place in the stream decide, so the bits are the same everywhere. None
        rounds to nearest, as float32 and float64 always are.

    Raises as `project` does, and ValueError for gammas of another length than plan.K, and leaves every
    parameter untouched then; torch's own error for a leaf that requires grad outside torch.no_grad(). A sum
    that is too large for a parameter's dtype becomes infinite, as in torch.
    """
    plan, params = checks.plan("apply_", plan), list(params)
    targets = checks.plan_tensors("apply_", plan, "params", params)
    alpha, kind = checks.number("apply_", "alpha", alpha), checks.kind("apply_", basis)
    rounding = None if rounding_seed is None else checks.seed("apply_", rounding_seed, "rounding_seed")
    seeds, weights, rows = [], [], []
    for i, update in enumerate(updates):
        seed, gammas, weight = checks.update("apply_", i, update, plan)
        seeds.append(seed)
        weights.append(weight)
        rows.append(gammas)
    checks.one_form("apply_", rows)
    tensors = {
        f"{part} of update {i}": tensor for i, row in enumerate(rows) for part, tensor in _parts(row).items()
    }
    checks.one_device("apply_", targets | tensors)
    for name, tensor in tensors.items():
        checks.finite("apply_", name, tensor)
    working = _working_dtype(*params, *tensors.values())
    for i, weight in enumerate(weights):
        checks.number("apply_", f"weight of update {i}", weight, working)
    for param in params:
        checks.may_change("apply_", param)
    checks.separate("apply_", targets)
    tables = (plan.blocks_table, plan.pieces_table)
    if floats := [row for row in rows if isinstance(row, Tensor)]:
        stacked = torch.stack([row.to(working) for row in floats])
        _apply_in_place(params, *tables, stacked, seeds, weights, alpha, kind, rounding)
    elif packed := [row for row in rows if isinstance(row, Packed)]:
        codes, scales = (torch.stack([getattr(row, part) for row in packed]) for part in ("codes", "scales"))
        bits, choice = packed[0].packing.bits, packed[0].packing.choice
        more = (codes, scales, bits, choice, seeds, weights, alpha, kind, rounding)
        _change_in_place(params, lambda dense: _ops.apply_packed_(dense, *tables, plan.K, *more))


def _parts(gammas: Tensor | Packed) -> dict[str, Tensor]:
    """The tensors of an update's coordinates, under the names that errors call them."""
    if isinstance(gammas, Packed):
        return {"codes": gammas.codes, "scales": gammas.scales}
    return {"gammas": gammas}


def has_cuda() -> bool:
    """Whether the operators for CUDA are loaded."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("ferret::project", "CUDA")


def cpu_capability() -> dict[str, Any]:
    """The CPU path in use (`isa`) and those that this processor can run (`available`, best last).

    FERRET_CPU_ISA in the environment chooses one before the first use; RuntimeError if it cannot be had.
    """
    return {"isa": _ops.cpu_isa(), "available": _native.available_isas()}


def set_cpu_isa(name: str) -> None:
    """Chooses the CPU path of this process, for tests and benchmarks: results do not depend on it."""
    if name not in _native.available_isas():
        available = ", ".join(_native.available_isas())
        raise ValueError(f"set_cpu_isa: name must be one of {available}, got {name!r}")
    _ops.set_cpu_isa(name)


def _apply_in_place(
    params: Sequence[Tensor],
    blocks: Tensor,
    pieces: Tensor,
    gammas: Tensor,
    seeds: list[int],
    weights: list[float],
    alpha: float,
    kind: int,
    rounding: int | None,
) -> None:
    """gammas [N, K]."""
    gammas = gammas.detach().to(_working_dtype(gammas, *params)).contiguous()
    more = (gammas, seeds, weights, alpha, kind, rounding)
    _change_in_place(params, lambda dense: _ops.apply_blocks_(dense, blocks, pieces, *more))


def _change_in_place(params: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
    """Parameters that are not contiguous are copied, changed and copied back."""
    targets = [param.detach() for param in params]
    dense = [target.contiguous() for target in targets]
    change(dense)
    strided = [i for i, target in enumerate(targets) if not target.is_contiguous()]
    if strided:  # in one call: between two an interrupt could leave half a model
        torch._foreach_copy_([targets[i] for i in strided], [dense[i] for i in strided])
    if not torch.compiler.is_compiling():  # else functionalization has seen the change
        torch.autograd.graph.increment_version([param for param in params if not param.is_inference()])


# ---- what torch.compile and autograd need to know ----


def _fake(name: str) -> Callable[[Function], Function]:
    register: Callable[[Function], Function] = torch.library.register_fake(f"ferret::{name}")
    return register


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@_fake("project")
def _fake_project(delta: Tensor, seed: int, k: int, kind: int, offset: int, numel: int) -> Tensor:
    return delta.new_empty([k], dtype=_working_dtype(delta))


@_fake("project_blocks")
def _fake_project_blocks(
    new: list[Tensor], old: list[Tensor], blocks: Tensor, pieces: Tensor, total: int, seed: int, kind: int
) -> Tensor:
    return new[0].new_empty([total], dtype=_working_dtype(*new, *old))


@_fake("reconstruct")
def _fake_reconstruct(
    gamma: Tensor, seed: int, count: int, kind: int, offset: int, numel: int, dtype: torch.dtype
) -> Tensor:
    return gamma.new_empty([count], dtype=dtype)


@_fake("apply_blocks_")
def _fake_apply_blocks_(params: list[Tensor], *args: Any) -> None:
    return None


@_fake("apply_packed_")
def _fake_apply_packed_(params: list[Tensor], *args: Any) -> None:
    return None


@_fake("pack")
def _fake_pack(gammas: Tensor, blocks: Tensor, total: int, bits: int, choice: int) -> tuple[Tensor, Tensor]:
    codes = gammas.new_empty([Packing(bits, choice).code_bytes(total)], dtype=torch.uint8)
    return codes, gammas.new_empty([blocks.shape[0]])


@_fake("unpack")
def _fake_unpack(
    codes: Tensor, scales: Tensor, blocks: Tensor, total: int, bits: int, choice: int
) -> tuple[Tensor, Tensor]:
    return scales.new_empty([total]), scales.new_empty([total], dtype=torch.int64)


@_fake("basis_")
def _fake_basis_(out: Tensor, *args: Any) -> None:
    return None


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    delta, ctx.seed, ctx.k, ctx.kind, ctx.offset, ctx.numel = inputs
    ctx.shape, ctx.dtype = delta.shape, delta.dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """delta -> 1/(rho K) V^T delta has the adjoint g -> 1/(rho K) V g."""
    count = math.prod(ctx.shape)
    rebuilt = _ops.reconstruct(grad, ctx.seed, count, ctx.kind, ctx.offset, ctx.numel, ctx.dtype)
    scale = ctx.numel / (VARIANCE[ctx.kind] * ctx.k)
    return rebuilt.view(ctx.shape) * scale, None, None, None, None, None


def _save_reconstruct(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gamma, ctx.seed, _, ctx.kind, ctx.offset, ctx.numel, _ = inputs
    ctx.k, ctx.dtype = gamma.numel(), gamma.dtype


def _reconstruct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """gamma -> V gamma has the adjoint g -> V^T g = rho K project(g)."""
    gamma = _ops.project(grad, ctx.seed, ctx.k, ctx.kind, ctx.offset, ctx.numel)
    scale = VARIANCE[ctx.kind] * ctx.k / max(ctx.numel, 1)
    return (gamma * scale).to(ctx.dtype), None, None, None, None, None, None


torch.library.register_autograd("ferret::project", _project_backward, setup_context=_save_project)
torch.library.register_autograd("ferret::reconstruct", _reconstruct_backward, setup_context=_save_reconstruct)
