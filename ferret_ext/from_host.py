"""project_difference where `old` is in host memory and `new` on a GPU: no second copy of the model is there.

Whole blocks come to the device a run at a time, into two buffers and on a stream of their own, while the run
before is projected. Coordinates of a block depend on its elements alone: they are those of one call, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import AnyPlan

# Of old that come together: long enough on the way for a launch to be nothing, short beside a model.
RUN_BYTES = 64 << 20
ALIGNMENT = 16  # bytes

# The operator: now, before, blocks table, pieces table, K -> gammas [K].
Operator = Callable[[list[Tensor], list[Tensor], Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Run:
    """Some blocks of a plan as a plan of their own, in which every piece is a tensor."""

    blocks: Tensor  # int64 [L, 4]
    pieces: Tensor  # int64 [P, 5]
    K: int
    old: list[Tensor]
    new: list[Tensor]

    @property
    def room(self) -> int:
        """Bytes that `old` takes in a buffer."""
        return sum(_aligned(x.nbytes) for x in self.old)


def cut(plan: AnyPlan, old: Sequence[Tensor], new: Sequence[Tensor], nbytes: int) -> Iterator[Run]:
    """Runs of blocks in their order, each of as many as have at most nbytes of `old` together, or of one."""
    blocks, pieces = plan.blocks_table, plan.pieces_table
    sizes = [0] * len(blocks)
    for tensor, _, length, _, block in pieces.tolist():
        sizes[block] += length * old[tensor].element_size()
    first, held = 0, 0
    for block, size in enumerate(sizes):
        if block > first and held + size > nbytes:
            yield _run(blocks[first:block], pieces, first, old, new)
            first, held = block, 0
        held += size
    yield _run(blocks[first:], pieces, first, old, new)


def project(plan: AnyPlan, old: Sequence[Tensor], new: Sequence[Tensor], operator: Operator) -> Tensor:
    """The coordinates [plan.K] on the device of `new`. All of `old` is on the CPU, all contiguous."""
    wide = any(x.dtype == torch.float64 for x in (*old, *new))  # decides about all blocks at once
    runs = list(cut(plan, old, new, sum(x.nbytes for x in old) if wide else RUN_BYTES))
    device = new[0].device
    buffers = [torch.empty(max(run.room for run in runs), dtype=torch.uint8, device=device) for _ in runs[:2]]
    work = torch.cuda.current_stream(device)
    copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copies.wait_stream(work)  # what `old` is written by, and what had the buffers' memory before
    gammas: list[Tensor] = []
    done: list[torch.cuda.Event] = []  # with a run, whose buffer may then be filled again
    for i, run in enumerate(runs):
        with torch.cuda.stream(copies):
            if i >= 2:
                copies.wait_event(done[i - 2])
            brought = fill(buffers[i % 2], run.old)
        work.wait_stream(copies)
        gammas.append(project_run(run, brought, operator, new[0], torch.float64 if wide else torch.float32))
        done.append(work.record_event())
    return torch.cat(gammas)


def project_run(run: Run, old: list[Tensor], operator: Operator, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A run's coordinates. old: `run.old` where the operator reads it."""
    if not run.new:  # a shard with nothing of these blocks
        return like.new_zeros(run.K, dtype=dtype)
    return operator(run.new, old, run.blocks, run.pieces, run.K)


def fill(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of these, which the buffer of bytes holds; from pinned memory the host does not wait."""
    copies, at = [], 0
    for x in tensors:
        copy = buffer[at : at + x.nbytes].view(x.dtype)
        copies.append(copy.copy_(x, non_blocking=True))
        at += _aligned(x.nbytes)
    return copies


def _run(blocks: Tensor, pieces: Tensor, first: int, old: Sequence[Tensor], new: Sequence[Tensor]) -> Run:
    blocks = blocks.clone()
    blocks[:, 3] -= blocks[0, 3].clone()
    rows = pieces[(pieces[:, 4] >= first) & (pieces[:, 4] < first + len(blocks))].clone()
    parts = [(tensor, slice(start, start + length)) for tensor, start, length, *_ in rows.tolist()]
    rows[:, 0] = torch.arange(len(rows))
    rows[:, 1] = 0
    rows[:, 4] -= first
    return Run(
        blocks,
        rows,
        int(blocks[:, 2].sum()),
        [old[tensor].reshape(-1)[part] for tensor, part in parts],
        [new[tensor].reshape(-1)[part] for tensor, part in parts],
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
