"""Checks of arguments: ValueError or TypeError that names operator, argument, expected and got."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .packing import Packed
from .plan import AnyPlan, BlockPlan, PlanShard

KINDS = {"rademacher": 1, "uniform": 2, "gaussian": 3}  # of docs/streams.md
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    """The value as an int in [low, high]."""
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}], got {number}")
    return number


def number(op: str, name: str, value: Any, working: torch.dtype = torch.float64) -> float:
    """The value as a finite float that the working precision can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    largest = torch.finfo(working).max
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not abs(result) <= largest:
        raise ValueError(f"{op}: {name} must be finite and at most {largest:.3g} in size, got {result}")
    return result


def seed(op: str, value: Any, name: str = "seed") -> int:
    """A seed in [-2^63, 2^64) as the signed 64-bit integer that the operators take."""
    number = integer(op, name, value, -(2**63), 2**64 - 1)
    return number - 2**64 if number >= 2**63 else number


def columns(op: str, K: Any) -> int:
    """A number of coordinates."""
    return integer(op, "K", K, 1, 2**32 - 1)


def kind(op: str, basis: Any) -> int:
    """The number of a basis kind in the stream contract."""
    if not isinstance(basis, str) or basis not in KINDS:
        raise ValueError(f"{op}: basis must be one of {', '.join(KINDS)}, got {basis!r}")
    return KINDS[basis]


def place(op: str, count: int, offset: Any, numel: Any) -> tuple[int, int]:
    """(offset, d) of `count` elements of a block of d = numel elements, by default all of it."""
    first = integer(op, "offset", offset, 0, 2**63 - 1 - count)
    return first, count if numel is None else integer(op, "numel", numel, count, 2**63 - 1)


def size(op: str, shape: Any) -> torch.Size:
    """A shape given as an int or a sequence of ints, of fewer than 2^63 elements."""
    try:
        result = torch.Size(map(operator.index, [shape] if isinstance(shape, Integral) else shape))
    except TypeError:
        raise TypeError(f"{op}: shape must be an int or a sequence of ints, got {shape!r}") from None
    if any(n < 0 for n in result) or math.prod(result) >= 2**63:
        raise ValueError(f"{op}: shape must be of 0 to 2^63 - 1 elements, got {list(result)}")
    return result


def dtype(op: str, value: Any) -> torch.dtype:
    """A dtype that the kernels know."""
    if value not in DTYPES:
        got = repr(value) if isinstance(value, torch.dtype) else f"{value!r}, a {type(value).__name__}"
        raise TypeError(f"{op}: dtype must be a torch.dtype of {_DTYPE_NAMES}, got {got}")
    assert isinstance(value, torch.dtype)
    return value


def tensor(op: str, name: str, value: Any) -> Tensor:
    """A dense floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be one of {_DTYPE_NAMES}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    return value


def no_tangent(op: str, name: str, value: Tensor) -> None:
    """What is differentiable is so in reverse mode alone; a tangent would be lost without a word."""
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
        raise TypeError(f"{op}: {name} must have no tangent (reverse mode alone is there), got one")


def coordinates(op: str, name: str, value: Any) -> Tensor:
    """A floating-point tensor of shape [K], K >= 1."""
    gamma = tensor(op, name, value)
    if gamma.dim() != 1 or gamma.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape [K], K >= 1, got {list(gamma.shape)}")
    return gamma


def update(op: str, i: int, value: Any, plan: AnyPlan) -> tuple[int, Tensor | Packed, float]:
    """Update i as (seed, gammas, weight), its gammas fitting the plan."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{op}: update {i} must be (seed, gammas, weight), got {type(value).__name__}")
    first, gammas, last = value
    if isinstance(gammas, Packed):
        packed(op, f"gammas of update {i}", plan, gammas)
    elif coordinates(op, f"gammas of update {i}", gammas).numel() != plan.K:
        raise ValueError(
            f"{op}: gammas of update {i} must have the plan's length {plan.K}, got {gammas.numel()}"
        )
    return seed(op, first, f"seed of update {i}"), gammas, number(op, f"weight of update {i}", last)


def packed(op: str, name: str, plan: AnyPlan, value: Any) -> Packed:
    """Packed coordinates of the plan's blocks."""
    if not isinstance(value, Packed):
        raise TypeError(f"{op}: {name} must be Packed, got {type(value).__name__}")
    expected = {"codes": value.packing.code_bytes(plan.K), "scales": len(plan.blocks)}
    for part, length in expected.items():
        got = getattr(value, part).numel()
        if got != length:
            raise ValueError(f"{op}: {part} of {name} must have the plan's length {length}, got {got}")
    finite(op, f"scales of {name}", value.scales)
    if values_known(value.scales) and (value.scales < 0).any():
        raise ValueError(f"{op}: scales of {name} must be >= 0, got {value.scales.min().item()}")
    largest = max((block.k for block in plan.blocks), default=0) << value.packing.choice
    if largest >= 2**32:
        raise ValueError(f"{op}: {name} must have fewer than 2^32 candidates a block, got {largest}")
    return value


def one_form(op: str, rows: Sequence[Tensor | Packed]) -> None:
    """All coordinates as floats, or all packed alike."""
    forms = {row.packing if isinstance(row, Packed) else None for row in rows}
    if len(forms) > 1:
        raise ValueError(f"{op}: updates must all be tensors or all Packed with one packing, got {forms}")


def one_device(op: str, tensors: Mapping[str, Tensor]) -> None:
    """All tensors on the device of the first."""
    (first, expected), *others = tensors.items()
    for name, other in others:
        if other.device != expected.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first}, {expected.device}, got {other.device}"
            )


def plan(op: str, value: Any) -> AnyPlan:
    """A plan, or a shard of one."""
    if not isinstance(value, (BlockPlan, PlanShard)):
        raise TypeError(f"{op}: plan must be a BlockPlan, or a shard of one, got {type(value).__name__}")
    return value


def plan_tensors(op: str, plan: AnyPlan, name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The plan's tensors in its order, under the names that errors call them."""
    if len(tensors) != len(plan.tensors):
        raise ValueError(f"{op}: {name} must be the plan's {len(plan.tensors)} tensors, got {len(tensors)}")
    named = {}
    for value, (label, numel) in zip(tensors, plan.tensors, strict=True):
        called = f"{name}[{label!r}]"
        named[called] = tensor(op, called, value)
        if value.numel() != numel:
            raise ValueError(f"{op}: {called} must have {numel} elements, got {value.numel()}")
    return named


def alike(op: str, olds: Mapping[str, Tensor], news: Mapping[str, Tensor]) -> None:
    """Tensors of one shape by pairs, or flat ones: elements of a transposed tensor would meet wrong ones."""
    for (first, old), (second, new) in zip(olds.items(), news.items(), strict=True):
        if old.shape != new.shape and 1 not in (old.dim(), new.dim()):
            expected, got = list(new.shape), list(old.shape)
            raise ValueError(f"{op}: {first} must have the shape of {second}, {expected}, got {got}")


def may_change(op: str, param: Tensor) -> None:
    """torch's own errors for in-place changes of leaves that require grad and of inference tensors."""
    if torch.is_grad_enabled() and param.requires_grad:
        if param.is_leaf:
            param.mul_(1)
        raise RuntimeError(f"{op}: a parameter inside a graph can only be changed under torch.no_grad()")
    if not torch.compiler.is_compiling() and param.is_inference() and not torch.is_inference_mode_enabled():
        param.mul_(1)


def separate(op: str, params: Mapping[str, Tensor]) -> None:
    """No element of a parameter in the memory of another element, of the same parameter or of another."""
    if torch.compiler.is_compiling():
        return
    seen: list[tuple[int, int, str]] = []
    for name, param in params.items():
        if param.numel() == 0 or param.is_meta or isinstance(param, FakeTensor):
            continue
        contiguous = param.is_contiguous()
        if not contiguous:
            _check_strides(op, name, param)
        # Strided parameters may lie between one another's elements; only the same start is sure to be shared.
        begin = param.data_ptr()
        seen.append((begin, begin + param.element_size() * (param.numel() if contiguous else 1), name))
    seen.sort()
    for (_, end, first), (begin, _, second) in pairwise(seen):
        if begin < end:
            raise ValueError(f"{op}: parameters must not share memory, got {first} and {second} that do")


def _check_strides(op: str, name: str, param: Tensor) -> None:
    reach = 0
    for stride, length in sorted(zip(param.stride(), param.shape, strict=True)):
        if length > 1 and stride <= reach:
            raise ValueError(f"{op}: {name} must not overlap itself in memory, got strides {param.stride()}")
        reach += stride * (length - 1)


def values_known(value: Tensor) -> bool:
    """Whether looking at values is possible: not while compiling, tracing or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or value.is_meta or isinstance(value, FakeTensor):
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def _all_finite(value: Tensor) -> bool:
    value = value.detach()
    # a finite sum has finite terms only; one that is not may have overflowed
    return math.isfinite(value.sum()) or bool(torch.isfinite(value).all())


def finite(op: str, name: str, value: Tensor) -> None:
    """No NaN or infinity, where values are known."""
    if not values_known(value) or _all_finite(value):
        return
    flat = value.detach().reshape(-1)
    bad = torch.isfinite(flat).logical_not_()
    first = int(bad.view(torch.uint8).argmax())
    raise ValueError(
        f"{op}: {name} must be finite, got {int(bad.sum())} of {flat.numel()} elements not finite, "
        f"the first {flat[first].item()} at index {first}"
    )


def result(op: str, gamma: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Finite coordinates. A NaN among them means a non-finite input; only then are the inputs searched."""
    if not values_known(gamma) or _all_finite(gamma):
        return
    for name, value in inputs.items():
        finite(op, name, value)
    raise ValueError(
        f"{op}: coordinates must fit {str(gamma.dtype).removeprefix('torch.')}, got larger ones; "
        "scale the input down first"
    )
