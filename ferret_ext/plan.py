"""Block plans: how a model is cut into blocks and how many of the K coordinates each block gets.

Block l holds d_l elements and K_l of the K bases (arXiv 2409.06277, equation 8). Projecting L equal blocks
costs 1/L of projecting the model as one block, at the same error.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from .allocation import Allocation, allocate, check_int

Granularity = Literal["tensor", "packed", "joined"]

TILE = 512  # stream elements that share a scale in project; blocks start at multiples of it
JOINING_TARGET = 2  # "joined" fills a block up to the size of so many coordinates
SMALLEST_PIECE = 2 * TILE  # elements of what `divided` makes
PACKING_TARGET = 0.9  # "packed" fills a block up to this share of the parameters' median size
FORMAT = 1  # of to_dict
_NORM_CHUNK = 1 << 22  # elements widened to float64 at a time by block_norms


@dataclass(frozen=True)
class Block:
    """`numel` stream elements from `offset` on, projected onto `k` bases."""

    name: str
    offset: int
    numel: int
    k: int


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of a model, as an immutable value that server and clients share.

    tensors: (name, numel) of every tensor, in the order in which lists of tensors are passed.
    blocks: consecutive runs of the tensors' concatenation; offsets are ascending multiples of 512.
    Raises ValueError where the two do not fit together. The other attributes follow from them:

    K: coordinates in all.
    starts: the first coordinate of each block in the flat gammas [K].
    """

    tensors: tuple[tuple[str, int], ...]
    blocks: tuple[Block, ...]
    K: int = field(init=False, repr=False, compare=False)
    starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _blocks_table: Tensor = field(init=False, repr=False, compare=False)
    _pieces_table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_tensors(self.tensors)
        _check_blocks(self.blocks)
        in_tensors = sum(numel for _, numel in self.tensors)
        in_blocks = sum(block.numel for block in self.blocks)
        if in_tensors != in_blocks:
            raise ValueError(
                f"BlockPlan: blocks must cover the tensors' {in_tensors} elements, got {in_blocks}"
            )
        *starts, total = accumulate((block.k for block in self.blocks), initial=0)
        rows = [
            (block.offset, block.numel, block.k, start)
            for block, start in zip(self.blocks, starts, strict=True)
        ]
        derived = {
            "K": total,
            "starts": tuple(starts),
            "_blocks_table": torch.tensor(rows, dtype=torch.int64),
            "_pieces_table": torch.tensor(list(_pieces(self.tensors, self.blocks)), dtype=torch.int64),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def blocks_table(self) -> Tensor:
        """A copy of int64 [L, 4]: offset, numel, k, start of each block."""
        return self._blocks_table.clone()

    @property
    def pieces_table(self) -> Tensor:
        """A copy of int64 [P, 5]: tensor, start, length, offset, block of each piece.

        A piece is a run of one tensor within one block: the tensor's elements [start, start + length) are
        stream elements [offset, offset + length).
        """
        return self._pieces_table.clone()

    @classmethod
    def from_parameters(
        cls,
        named_parameters: Iterable[tuple[str, Tensor]],
        K: int,
        *,
        granularity: Granularity | int = "tensor",
        allocation: Allocation = "size",
        norms: Sequence[float] | None = None,
    ) -> BlockPlan:
        """A plan over the trainable parameters of a model, e.g. of `model.named_parameters()`.

        Parameters that are frozen, empty or seen before (tied) are left out.
        granularity: "tensor", a block a parameter; "packed", whole parameters in order, a block closing when
        it reaches 0.9 times the median parameter; "joined", the same at the size of two coordinates, 2 d / K
        elements, which joins few where K is large and lets K be as small as 1; an int N, blocks of N elements
        of the concatenation.
        allocation, norms: see `with_allocation`.
        """
        if not isinstance(named_parameters, Iterable) or isinstance(named_parameters, Mapping):
            raise TypeError(
                "BlockPlan.from_parameters: named_parameters must be (name, parameter) pairs as of "
                f"model.named_parameters(), got {type(named_parameters).__name__}"
            )
        named = list(named_parameters)
        tensors = tuple((name, parameter.numel()) for name, parameter in _trainable(named))
        if not tensors:
            raise ValueError(
                "BlockPlan.from_parameters: expected a non-empty parameter that requires grad, got none "
                f"among {len(named)}"
            )
        spans = _cut(tensors, granularity, K)
        numels = [numel for _, numel in spans]
        counts = allocate(numels, K, allocation, norms)
        blocks = map(Block, [name for name, _ in spans], _tile_aligned_offsets(numels), numels, counts)
        return cls(tensors, tuple(blocks))

    def with_allocation(
        self, allocation: Allocation, K: int | None = None, norms: Sequence[float] | None = None
    ) -> BlockPlan:
        """The same blocks with other K_l >= 1, whose sum is exactly K (default: the plan's).

        allocation: K_l in proportion to d_l ("size"), sqrt(d_l) ("sqrt-size", the least mean-square error if
        all norms are alike), 1 ("equal"), ||delta_l|| ("norm", as in the paper's experiments),
        sqrt(||delta_l||) ("sqrt-norm", its proposition 2), ||delta_l|| sqrt(d_l) ("mse", the least
        mean-square error) or ||delta_l||^(3/2) d_l^(1/4) ("curvature", less error where the update's elements
        are large, since there the loss tends to curve most; docs/quality.md).
        norms: ||delta_l|| of each block for the last four, e.g. from `block_norms`; all zero means "equal".
        Raises ValueError if K is below the number of blocks, or a norm is missing, negative or not finite.
        """
        numels = [block.numel for block in self.blocks]
        return self.with_counts(allocate(numels, self.K if K is None else K, allocation, norms))

    def with_counts(self, counts: Sequence[int]) -> BlockPlan:
        """The same blocks with these K_l >= 1, one a block; ValueError for others."""
        blocks = (
            Block(block.name, block.offset, block.numel, k)
            for block, k in zip(self.blocks, counts, strict=True)
        )
        return BlockPlan(self.tensors, tuple(blocks))

    def divided(self, most: int) -> BlockPlan:
        """The plan with its blocks of more than `most` coordinates cut into equal pieces of no more.

        Elements and coordinates are shared out evenly over the pieces, so that an update's mean-square error
        stays what it was, while the work, the sum of d_l K_l, falls; an allocation by the pieces' norms then
        lowers the error too. Pieces have at least 1024 elements, if need be with more coordinates, since
        smaller ones would leave tiles half empty. Raises ValueError for most < 1.
        """
        most = check_int("BlockPlan.divided: most", most, 1, 2**63 - 1)
        rows = [row for block in self.blocks for row in _divide(block, most)]
        names, numels, counts = zip(*rows, strict=True)
        return BlockPlan(
            self.tensors, tuple(map(Block, names, _tile_aligned_offsets(numels), numels, counts))
        )

    def select(self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """The plan's tensors in its order, by name; ValueError if one is missing or has another length."""
        by_name = dict(named_tensors)
        missing = [name for name, _ in self.tensors if name not in by_name]
        if missing:
            raise ValueError(
                f"BlockPlan.select: expected a tensor for every name of the plan, {missing[0]!r} is missing"
            )
        selected = [by_name[name] for name, _ in self.tensors]
        _check_lengths("select", self.tensors, selected)
        return selected

    def split(self, gammas: Tensor) -> list[Tensor]:
        """The flat gammas [K] as one view [K_l] a block."""
        if gammas.dim() != 1 or gammas.numel() != self.K:
            raise ValueError(f"BlockPlan.split: gammas must have shape [{self.K}], got {list(gammas.shape)}")
        return list(gammas.split_with_sizes([block.k for block in self.blocks]))

    def block_norms(self, tensors: Sequence[Tensor]) -> list[float]:
        """The Euclidean norm of each block, in float64; tensors in the plan's order, of any float dtype."""
        _check_lengths("block_norms", self.tensors, tensors)
        return _norms(self, [tensor.detach().reshape(-1) for tensor in tensors], None)

    def block_norms_of_difference(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[float]:
        """The norm of each block of old - new, which is never held as a whole."""
        return _norms_of_difference(self, old, new)

    def shard(self, ranges: Iterable[tuple[int, int]]) -> PlanShard:
        """The plan as a process sees it that holds a part of each tensor.

        ranges: (start, stop) of each tensor's part, in elements of the flattened tensor; start = stop for
        none. A row shard of a contiguous tensor is such a part (`fsdp.ranges`). Raises ValueError.
        """
        return PlanShard(self, tuple((start, stop) for start, stop in ranges))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, dicts, strings and ints, ready for JSON."""
        tensors = [[name, numel] for name, numel in self.tensors]
        blocks = [[block.name, block.offset, block.numel, block.k] for block in self.blocks]
        return {"format": FORMAT, "tensors": tensors, "blocks": blocks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockPlan:
        """The inverse of `to_dict`; ValueError for anything that `to_dict` cannot have written."""
        if not isinstance(data, Mapping) or set(data) != {"format", "tensors", "blocks"}:
            got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"BlockPlan.from_dict: expected the keys blocks, format, tensors, got {got}")
        if data["format"] != FORMAT:
            raise ValueError(f"BlockPlan.from_dict: expected format {FORMAT}, got {data['format']!r}")
        tensors = tuple((name, numel) for name, numel in _rows(data, "tensors", 2))
        return cls(tensors, tuple(Block(*row) for row in _rows(data, "blocks", 4)))

    def digest(self) -> str:
        """sha256 of the canonical JSON as hex: equal digests mean equal plans."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class PlanShard:
    """A part of every tensor of a plan, for `project_difference` and `apply_` in place of the whole.

    Blocks, bases and coordinates are the plan's: the coordinates of all parts add up to the whole's, and what
    is applied to a part is that part of what is applied to the whole, bit for bit. Tensors are the parts, of
    stop - start elements each, none left out.
    Raises ValueError for a range that is not within its tensor.
    """

    plan: BlockPlan
    ranges: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[str, int], ...] = field(init=False, repr=False, compare=False)
    _pieces_table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_ranges(self.ranges, self.plan.tensors)
        pairs = zip(self.plan.tensors, self.ranges, strict=True)
        tensors = tuple((name, stop - start) for (name, _), (start, stop) in pairs)
        object.__setattr__(self, "tensors", tensors)  # the class is frozen
        object.__setattr__(self, "_pieces_table", _cut_to(self.plan.pieces_table, self.ranges))

    @property
    def K(self) -> int:
        return self.plan.K

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.plan.blocks

    @property
    def blocks_table(self) -> Tensor:
        """That of the plan: a block's length is the whole's."""
        return self.plan.blocks_table

    @property
    def pieces_table(self) -> Tensor:
        """A copy of int64 [P, 5] as `BlockPlan.pieces_table` has it; `start` counts within the part."""
        return self._pieces_table.clone()

    def with_counts(self, counts: Sequence[int]) -> PlanShard:
        """The same parts with these K_l >= 1, one a block."""
        return PlanShard(self.plan.with_counts(counts), self.ranges)

    def block_norms_of_difference(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[float]:
        """The norm of what is here of each block of old - new."""
        return _norms_of_difference(self, old, new)


AnyPlan = BlockPlan | PlanShard


def _check_lengths(where: str, expected: Sequence[tuple[str, int]], tensors: Sequence[Tensor]) -> None:
    if len(tensors) != len(expected):
        raise ValueError(f"BlockPlan.{where}: expected {len(expected)} tensors, got {len(tensors)}")
    for (name, numel), tensor in zip(expected, tensors, strict=True):
        if tensor.numel() != numel:
            raise ValueError(f"BlockPlan.{where}: {name!r} must have {numel} elements, got {tensor.numel()}")


def _check_ranges(ranges: Sequence[tuple[int, int]], tensors: Sequence[tuple[str, int]]) -> None:
    if len(ranges) != len(tensors):
        raise ValueError(f"BlockPlan.shard: expected {len(tensors)} ranges, one a tensor, got {len(ranges)}")
    for (name, numel), (start, stop) in zip(tensors, ranges, strict=True):
        check_int(f"BlockPlan.shard: start of {name!r}", start, 0, numel)
        check_int(f"BlockPlan.shard: stop of {name!r}", stop, start, numel)


def _cut_to(pieces: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The pieces as far as they lie within their tensor's range, counted from its start."""
    starts, stops = torch.tensor(ranges, dtype=torch.int64)[pieces[:, 0]].unbind(1)
    tensor, start, length, offset, block = pieces.unbind(1)
    first, last = torch.maximum(start, starts), torch.minimum(start + length, stops)
    cut = torch.stack([tensor, first - starts, last - first, offset + first - start, block], dim=1)
    return cut[last > first].contiguous()


def _norms_of_difference(plan: AnyPlan, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[float]:
    for tensors in (old, new):
        _check_lengths("block_norms_of_difference", plan.tensors, tensors)
    flat = ([tensor.detach().reshape(-1) for tensor in tensors] for tensors in (old, new))
    return _norms(plan, *flat)


def _norms(plan: AnyPlan, tensors: Sequence[Tensor], minus: Sequence[Tensor] | None) -> list[float]:
    parts: list[list[float]] = [[] for _ in plan.blocks]
    for tensor, start, length, _, block in plan.pieces_table.tolist():
        for begin in range(start, start + length, _NORM_CHUNK):
            run = slice(begin, min(begin + _NORM_CHUNK, start + length))
            values = tensors[tensor][run].double()
            if minus is not None:
                values = values - minus[tensor][run].to(values)
            parts[block].append(torch.linalg.vector_norm(values).item())
    return [math.hypot(*norms) for norms in parts]


def _trainable(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each non-empty parameter that requires grad, once."""
    seen: set[int] = set()
    for item in named_parameters:
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], Tensor):
            raise TypeError(
                "BlockPlan.from_parameters: named_parameters must be (name, parameter) pairs as of "
                f"model.named_parameters(), got {type(item).__name__}"
            )
        name, parameter = item
        if parameter.requires_grad and parameter.numel() > 0 and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _cut(tensors: Sequence[tuple[str, int]], granularity: Granularity | int, K: int) -> list[tuple[str, int]]:
    """(name, numel) of each block."""
    if granularity == "tensor":
        return list(tensors)
    if granularity == "packed":
        return _pack(tensors, PACKING_TARGET * statistics.median(numel for _, numel in tensors))
    if granularity == "joined":
        size = JOINING_TARGET * sum(numel for _, numel in tensors)
        return _pack(tensors, -(-size // check_int("BlockPlan: K", K, 1, 2**63 - 1)))
    if isinstance(granularity, Integral) and not isinstance(granularity, bool) and int(granularity) >= 1:
        size, total = int(granularity), sum(numel for _, numel in tensors)
        ends = [*range(size, total, size), total]
        return [(f"[{begin}:{end}]", end - begin) for begin, end in pairwise([0, *ends])]
    raise ValueError(
        f'BlockPlan: granularity must be "tensor", "packed", "joined" or an int >= 1, got {granularity!r}'
    )


def _divide(block: Block, most: int) -> list[tuple[str, int, int]]:
    """(name, numel, k) of the block's pieces."""
    pieces = max(1, min(-(-block.k // most), block.numel // SMALLEST_PIECE))
    if pieces == 1:
        return [(block.name, block.numel, block.k)]
    ends, counts = ([whole * i // pieces for i in range(pieces + 1)] for whole in (block.numel, block.k))
    return [
        (f"{block.name}[{begin}:{end}]", end - begin, last - first)
        for (begin, end), (first, last) in zip(pairwise(ends), pairwise(counts), strict=True)
    ]


def _pack(tensors: Sequence[tuple[str, int]], target: float) -> list[tuple[str, int]]:
    """Whole tensors in order, a block closing as soon as it reaches the target."""
    packed, names, size = [], [], 0
    for index, (name, numel) in enumerate(tensors):
        names.append(name)
        size += numel
        if size >= target or index == len(tensors) - 1:
            packed.append((name if len(names) == 1 else f"{names[0]}..{name}", size))
            names, size = [], 0
    return packed


def _tile_aligned_offsets(numels: Sequence[int]) -> list[int]:
    return list(accumulate((-(-numel // TILE) * TILE for numel in numels[:-1]), initial=0))


def _pieces(
    tensors: Sequence[tuple[str, int]], blocks: Sequence[Block]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Walks tensors and blocks side by side, and cuts at the ends of either."""
    tensor, start = 0, 0
    for index, block in enumerate(blocks):
        done = 0
        while done < block.numel:
            length = min(tensors[tensor][1] - start, block.numel - done)
            yield tensor, start, length, block.offset + done, index
            done += length
            start += length
            if start == tensors[tensor][1]:
                tensor, start = tensor + 1, 0


def _check_tensors(tensors: Sequence[tuple[str, int]]) -> None:
    if not tensors:
        raise ValueError("BlockPlan: expected at least one tensor, got none")
    for name, numel in tensors:
        _check_name("tensor", name)
        check_int(f"BlockPlan: numel of tensor {name!r}", numel, 1, 2**63 - 1)
    if len({name for name, _ in tensors}) != len(tensors):
        names = [name for name, _ in tensors]
        raise ValueError(
            f"BlockPlan: tensor names must differ, got {max(names, key=names.count)!r} more than once"
        )


def _check_blocks(blocks: Sequence[Block]) -> None:
    end = 0
    for block in blocks:
        _check_name("block", block.name)
        check_int(f"BlockPlan: offset of block {block.name!r}", block.offset, 0, 2**63 - 1)
        check_int(f"BlockPlan: numel of block {block.name!r}", block.numel, 1, 2**63 - 1 - block.offset)
        check_int(f"BlockPlan: k of block {block.name!r}", block.k, 1, 2**32 - 1)
        if block.offset % TILE or block.offset < end:
            raise ValueError(
                f"BlockPlan: block {block.name!r} must start at a multiple of {TILE} and not before {end}, "
                f"got {block.offset}"
            )
        end = block.offset + block.numel


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"BlockPlan: name of a {kind} must be a non-empty str, got {name!r}")


def _rows(data: Mapping[str, Any], key: str, width: int) -> list[Sequence[Any]]:
    rows = data[key]
    if not isinstance(rows, (list, tuple)) or any(
        not isinstance(row, (list, tuple)) or len(row) != width for row in rows
    ):
        raise ValueError(
            f"BlockPlan.from_dict: {key} must be a list of rows of {width} values, got {rows!r:.80}"
        )
    return list(rows)
