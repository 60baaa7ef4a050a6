"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has cut by rows, as parts of a plan's tensors.

    params = plan.select(model.named_parameters())
    part = plan.shard(fsdp.ranges(params))
    gammas = fsdp.total(project_difference(part, start, fsdp.local(params), seed), params)
    apply_(part, fsdp.local(params), updates, alpha)

Every rank gets the whole model's coordinates, and its own part of the weights that one process would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def is_cut(tensor: Tensor) -> bool:
    """Whether it is spread over several processes."""
    return isinstance(tensor, DTensor)


def ranges(params: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(start, stop) of this rank's part of each parameter, in elements of the flattened one.

    Raises ValueError for parameters that are not cut as `fully_shard` does it by default: by their first
    dimension, over a mesh of one dimension.
    """
    found = []
    for index, param in enumerate(params):
        cut = _checked(index, param)
        part = row_range(cut.shape, cut.device_mesh.get_local_rank(), cut.device_mesh.size())
        if cut.to_local().numel() != part[1] - part[0]:
            raise ValueError(
                f"fsdp: parameter {index} must have {part[1] - part[0]} elements on this rank, got "
                f"{cut.to_local().numel()}"
            )
        found.append(part)
    return found


def row_range(shape: Sequence[int], rank: int, size: int) -> tuple[int, int]:
    """(start, stop) of a rank's rows, in elements: all ranks but the last ones have as many, rounded up.

    shape: of the whole. The last ranks may have fewer rows, or none.
    """
    rows, width = shape[0], math.prod(shape[1:])
    each = -(-rows // size)
    return min(rank * each, rows) * width, min((rank + 1) * each, rows) * width


def local(params: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each parameter, in the parameter's own memory, without its gradient."""
    with torch.no_grad():
        return [_checked(index, param).to_local() for index, param in enumerate(params)]


def whole(params: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each parameter as a whole, one at a time, on every rank, all of which must go through all of them."""
    with torch.no_grad():
        for index, param in enumerate(params):
            yield _checked(index, param).full_tensor()


def total(values: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The sum of all ranks' values, the same bits on each: added in float64, rounded once to their dtype.

    values: of any shape, on the parameters' device. Waits for all ranks that hold a part of the parameters.
    """
    wide = values.to(torch.float64, copy=True)
    dist.all_reduce(wide, group=_checked(0, params[0]).device_mesh.get_group())
    return wide.to(values.dtype)


def _checked(index: int, param: Tensor) -> DTensor:
    if not isinstance(param, DTensor):
        raise ValueError(f"fsdp: parameter {index} must be a DTensor, got {type(param).__name__}")
    if param.placements != (Shard(0),) or param.dim() == 0:
        raise ValueError(
            f"fsdp: parameter {index} must be cut by its first dimension over a mesh of one dimension, got "
            f"{param.placements} of shape {list(param.shape)}"
        )
    return param
