"""The native operators as Python functions: checks, fake kernels for torch.compile, and autograd.

The operators themselves (`torch.ops.ferret.*`) are registered by the libraries in `lib/`; this is the only module that
names them. Bad input raises ValueError or TypeError here, naming argument, expected and got, before anything is touched.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import _native
from .plan import BlockPlan

Basis = Literal["rademacher", "uniform", "gaussian"]
Shape = int | Sequence[int]

KINDS = {"rademacher": 1, "uniform": 2, "gaussian": 3}
VARIANCE = {1: 1.0, 2: 21845 / 65536, 3: 1.0}  # rho d of docs/streams.md
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _load_libraries() -> None:
    folder = Path(__file__).parent / "lib"
    torch.ops.load_library(folder / "libferret_ops.so")
    cuda = folder / "libferret_ops_cuda.so"
    if cuda.exists() and torch.version.cuda is not None:
        # torch loads its CUDA libraries lazily; the operators only need them where there is a driver.
        ctypes.CDLL(str(cuda))


_load_libraries()


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
    offset, numel: for a shard, the place of its first element in its block and the block's length d; the coordinates of
        all shards add up to the block's.
    Returns gamma [K], float32 (float64 for a float64 delta), on delta's device; the same bits on every device.
    Raises ValueError for numbers out of range and for a NaN or infinity in delta, TypeError for a delta that is not
    floating point. Differentiable. On CUDA the check for finite values waits for the result; it is left out while a graph
    is captured or compiled, where a non-finite delta gives NaN coordinates.
    """
    _check_tensor("project", "delta", delta)
    place = _place("project", delta.numel(), offset, numel)
    k, kind = _columns("project", K), _kind("project", basis)
    gamma = torch.ops.ferret.project(delta, _seed("project", seed), k, kind, *place)
    _check_result("project", gamma, {"delta": delta})
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

    gamma: [K], floating point. shape: of the result (or of the shard at `offset` of a block of `numel` elements).
    dtype: of the result; device: of the result, by default gamma's, which is moved there first.
    Returns a tensor of that shape; the same bits on every device. Raises as `project` does. Differentiable in gamma.
    """
    gamma = _coordinates("reconstruct", gamma)
    if device is not None:
        gamma = gamma.to(device)
    _check_dtype("reconstruct", dtype)
    size = _size("reconstruct", shape)
    count = math.prod(size)
    place = _place("reconstruct", count, offset, numel)
    _check_finite("reconstruct", "gamma", gamma)
    flat = torch.ops.ferret.reconstruct(
        gamma, _seed("reconstruct", seed), count, _kind("reconstruct", basis), *place, dtype
    )
    return flat.view(size)


def reconstruct_(
    param: Tensor,
    gamma: Tensor,
    seed: int,
    *,
    alpha: float = 1.0,
    basis: Basis = "rademacher",
    offset: int = 0,
    numel: int | None = None,
) -> Tensor:
    """param += alpha V gamma, in one read and one write of param, rounded once to its dtype.

    param: any shape and strides, on gamma's device. Other arguments as for `reconstruct`. Returns param.
    Raises as `project` does, and leaves param untouched then.
    """
    _check_tensor("reconstruct_", "param", param)
    gamma = _coordinates("reconstruct_", gamma)
    _check_devices("reconstruct_", {"param": param, "gamma": gamma})
    _check_number("reconstruct_", "alpha", alpha)
    place = _place("reconstruct_", param.numel(), offset, numel)
    seed, kind = _seed("reconstruct_", seed), _kind("reconstruct_", basis)
    _check_finite("reconstruct_", "gamma", gamma)
    if torch.is_grad_enabled() and (param.requires_grad or gamma.requires_grad):
        rebuilt = torch.ops.ferret.reconstruct(gamma, seed, param.numel(), kind, *place, param.dtype)
        return param.add_(rebuilt.view(param.shape), alpha=alpha)
    blocks = torch.tensor([[*place, gamma.numel(), 0]])
    pieces = torch.tensor([[0, 0, param.numel(), place[0], 0]][: param.numel()], dtype=torch.int64).view(-1, 5)
    _apply_in_place([param], blocks, pieces, gamma[None], [seed], [1.0], alpha, kind)
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
    """Column v_k of the basis, with its scale 1/sqrt(d): what `project` and `reconstruct` regenerate and never store.

    k: in [0, 2^32). Other arguments and errors as for `reconstruct`.
    """
    _check_dtype("basis", dtype)
    size = _size("basis", shape)
    out = torch.empty(size, dtype=dtype, device=device)
    place = _place("basis", out.numel(), offset, numel)
    k = _integer("basis", "k", k, 0, 2**32 - 1)
    torch.ops.ferret.basis_(out, _seed("basis", seed), k, _kind("basis", basis), *place)
    return out


def project_difference(
    plan: BlockPlan, old: Sequence[Tensor], new: Sequence[Tensor], seed: int, *, basis: Basis = "rademacher"
) -> Tensor:
    """The coordinates of old - new for every block of a plan; the difference is never materialised.

    old, new: the plan's tensors in its order, on one device; dtypes may differ.
    Returns the flat gammas [plan.K], float32 (float64 if any tensor is); `plan.split` gives them by block.
    Raises as `project` does.
    """
    op = "project_difference"
    _check_plan_tensors(op, plan, "old", old)
    _check_plan_tensors(op, plan, "new", new)
    _check_devices(op, {"old[0]": old[0], **{f"new[{i}]": t for i, t in enumerate(new)}})
    _check_devices(op, {"new[0]": new[0], **{f"old[{i}]": t for i, t in enumerate(old)}})
    seed, kind = _seed(op, seed), _kind(op, basis)
    gammas = torch.ops.ferret.project_blocks(
        [t.detach().contiguous() for t in new],
        [t.detach().contiguous() for t in old],
        plan.blocks_table,
        plan.pieces_table,
        plan.K,
        seed,
        kind,
    )
    _check_result(
        op,
        gammas,
        {f"{side}[{name!r}]": t for side, ts in (("old", old), ("new", new)) for (name, _), t in zip(plan.tensors, ts, strict=True)},
    )
    return gammas


def apply_(
    plan: BlockPlan,
    params: Sequence[Tensor],
    updates: Sequence[tuple[int, Tensor, float]],
    alpha: float,
    *,
    basis: Basis = "rademacher",
) -> None:
    """params += alpha sum_i weight_i V_i gamma_i for updates (seed, gammas, weight), each parameter read and written once.

    params: the plan's tensors in its order, on one device with the gammas. gammas: [plan.K].
    Raises as `project` does, ValueError for gammas of another length than plan.K, and leaves every parameter untouched
    then; torch's own error for a leaf that requires grad outside no_grad.
    """
    _check_plan_tensors("apply_", plan, "params", params)
    _check_number("apply_", "alpha", alpha)
    kind = _kind("apply_", basis)
    seeds, weights, rows = [], [], []
    for i, (seed, gammas, weight) in enumerate(updates):
        gammas = _coordinates("apply_", gammas, f"gammas of update {i}")
        if gammas.numel() != plan.K:
            raise ValueError(f"apply_: gammas of update {i} must have length {plan.K} (the plan's K), got {gammas.numel()}")
        _check_devices("apply_", {"params[0]": params[0], f"gammas of update {i}": gammas})
        _check_finite("apply_", f"gammas of update {i}", gammas)
        _check_number("apply_", f"weight of update {i}", weight)
        seeds.append(_seed("apply_", seed))
        weights.append(float(weight))
        rows.append(gammas)
    if not rows:
        return
    if torch.is_grad_enabled():
        for param in params:
            _check_may_change(param)
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    stacked = torch.stack([row.to(dtype) for row in rows])
    _apply_in_place(params, plan.blocks_table, plan.pieces_table, stacked, seeds, weights, alpha, kind)


def cpu_capability() -> dict[str, Any]:
    """The CPU path in use (`isa`) and those this processor can run (`available`, best last).

    FERRET_CPU_ISA in the environment chooses one before the first use.
    """
    return {"isa": torch.ops.ferret.cpu_isa(), "available": _native.available_isas()}


def set_cpu_isa(name: str) -> None:
    """Chooses the CPU path for this process, for tests and benchmarks; results do not depend on it."""
    if name not in _native.available_isas():
        raise ValueError(f"set_cpu_isa: name must be one of {', '.join(_native.available_isas())}, got {name!r}")
    torch.ops.ferret.set_cpu_isa(name)


def _apply_in_place(
    params: Sequence[Tensor],
    blocks: Tensor,
    pieces: Tensor,
    gammas: Tensor,
    seeds: list[int],
    weights: list[float],
    alpha: float,
    kind: int,
) -> None:
    """gammas [N, K]; parameters that are not contiguous are copied, changed and copied back."""
    targets = [param.detach() for param in params]
    dense = [target.contiguous() for target in targets]
    wide = gammas.dtype == torch.float64 or any(t.dtype == torch.float64 for t in dense)
    gammas = gammas.detach().to(torch.float64 if wide else torch.float32).contiguous()
    torch.ops.ferret.apply_blocks_(dense, blocks, pieces, gammas, seeds, weights, float(alpha), kind)
    for target, changed in zip(targets, dense, strict=True):
        if changed is not target and not target.is_contiguous():
            target.copy_(changed)
    torch.autograd.graph.increment_version([t for t in params if not t.is_inference()])


# ---- checks ----


def _integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}], got {number}")
    return number


def _seed(op: str, seed: Any) -> int:
    """As the signed integer that the operators take."""
    number = _integer(op, "seed", seed, -(2**63), 2**64 - 1)
    return number - 2**64 if number >= 2**63 else number


def _columns(op: str, K: Any) -> int:
    return _integer(op, "K", K, 1, 2**32 - 1)


def _kind(op: str, basis: str) -> int:
    if basis not in KINDS:
        raise ValueError(f"{op}: basis must be one of {', '.join(KINDS)}, got {basis!r}")
    return KINDS[basis]


def _place(op: str, count: int, offset: Any, numel: Any) -> tuple[int, int]:
    """(offset, d) of `count` elements."""
    offset = _integer(op, "offset", offset, 0, 2**63 - 1 - count)
    numel = count if numel is None else _integer(op, "numel", numel, count, 2**63 - 1)
    return offset, numel


def _size(op: str, shape: Shape) -> torch.Size:
    try:
        size = torch.Size([shape] if isinstance(shape, int) else shape)
    except TypeError:
        raise TypeError(f"{op}: shape must be an int or a sequence of ints, got {shape!r}") from None
    if any(n < 0 for n in size):
        raise ValueError(f"{op}: shape must not be negative, got {list(size)}")
    return size


def _check_dtype(op: str, dtype: Any) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _check_tensor(op: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")


def _coordinates(op: str, gamma: Any, name: str = "gamma") -> Tensor:
    _check_tensor(op, name, gamma)
    if gamma.dim() != 1 or gamma.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape [K], K >= 1, got {list(gamma.shape)}")
    return gamma


def _check_number(op: str, name: str, value: Any) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def _check_devices(op: str, tensors: dict[str, Tensor]) -> None:
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != expected.device:
            raise ValueError(f"{op}: {name} must be on the device of {first}, {expected.device}, got {tensor.device}")


def _check_plan_tensors(op: str, plan: Any, name: str, tensors: Sequence[Tensor]) -> None:
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"{op}: plan must be a BlockPlan, got {type(plan).__name__}")
    if len(tensors) != len(plan.tensors):
        raise ValueError(f"{op}: {name} must be the plan's {len(plan.tensors)} tensors, got {len(tensors)}")
    for tensor, (label, numel) in zip(tensors, plan.tensors, strict=True):
        _check_tensor(op, f"{name}[{label!r}]", tensor)
        if tensor.numel() != numel:
            raise ValueError(f"{op}: {name}[{label!r}] must have {numel} elements, got {tensor.numel()}")
    _check_devices(op, {f"{name}[{label!r}]": t for t, (label, _) in zip(tensors, plan.tensors, strict=True)})


def _check_may_change(param: Tensor) -> None:
    if param.requires_grad and param.is_leaf:
        param.mul_(1)  # raises torch's own error for in-place changes of leaves
    if param.requires_grad:
        raise RuntimeError("apply_: a parameter that is part of a graph can only be changed inside torch.no_grad()")


def _checks_values(tensor: Tensor) -> bool:
    """Whether looking at values is possible here; it is not while compiling or capturing a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_finite(op: str, name: str, tensor: Tensor) -> None:
    if not _checks_values(tensor):
        return
    finite = torch.isfinite(tensor.detach())
    if finite.all():
        return
    bad = (~finite).reshape(-1).nonzero()
    first, count = int(bad[0]), bad.numel()
    value = tensor.detach().reshape(-1)[first].item()
    raise ValueError(f"{op}: {name} must be finite, got {count} of {tensor.numel()} not finite, the first {value} at index {first}")


def _check_result(op: str, gamma: Tensor, inputs: dict[str, Tensor]) -> None:
    """A non-finite coordinate means a non-finite input; only then are the inputs searched."""
    if not _checks_values(gamma) or torch.isfinite(gamma.detach()).all():
        return
    for name, tensor in inputs.items():
        _check_finite(op, name, tensor)
    names = " and ".join(dict.fromkeys(name.split("[")[0] for name in inputs))
    raise ValueError(f"{op}: {names} must give coordinates within {gamma.dtype}, got larger ones; scale {names} down first")


# ---- what torch.compile and autograd need to know ----


@torch.library.register_fake("ferret::project")
def _(delta: Tensor, seed: int, k: int, kind: int, offset: int, numel: int) -> Tensor:
    return delta.new_empty([k], dtype=_working_dtype([delta]))


@torch.library.register_fake("ferret::project_blocks")
def _(
    new: list[Tensor], old: list[Tensor], blocks: Tensor, pieces: Tensor, total: int, seed: int, kind: int
) -> Tensor:
    return new[0].new_empty([total], dtype=_working_dtype([*new, *old]))


@torch.library.register_fake("ferret::reconstruct")
def _(gamma: Tensor, seed: int, count: int, kind: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    return gamma.new_empty([count], dtype=dtype)


@torch.library.register_fake("ferret::apply_blocks_")
def _(params: list[Tensor], *args: Any) -> None:
    return None


@torch.library.register_fake("ferret::basis_")
def _(out: Tensor, *args: Any) -> None:
    return None


def _working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    delta, ctx.seed, ctx.k, ctx.kind, ctx.offset, ctx.numel = inputs
    ctx.shape, ctx.dtype = delta.shape, delta.dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """delta -> 1/(rho K) V^T delta has the adjoint g -> 1/(rho K) V g."""
    count = math.prod(ctx.shape)
    rebuilt = torch.ops.ferret.reconstruct(grad, ctx.seed, count, ctx.kind, ctx.offset, ctx.numel, ctx.dtype)
    return rebuilt.view(ctx.shape) * (ctx.numel / (VARIANCE[ctx.kind] * ctx.k)), None, None, None, None, None


def _save_reconstruct(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gamma, ctx.seed, _, ctx.kind, ctx.offset, ctx.numel, _ = inputs
    ctx.k, ctx.dtype = gamma.numel(), gamma.dtype


def _reconstruct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """gamma -> V gamma has the adjoint g -> V^T g = rho K project(g)."""
    gamma = torch.ops.ferret.project(grad, ctx.seed, ctx.k, ctx.kind, ctx.offset, ctx.numel)
    scale = VARIANCE[ctx.kind] * ctx.k / max(ctx.numel, 1)
    return (gamma * scale).to(ctx.dtype), None, None, None, None, None, None


torch.library.register_autograd("ferret::project", _project_backward, setup_context=_save_project)
torch.library.register_autograd("ferret::reconstruct", _reconstruct_backward, setup_context=_save_reconstruct)
