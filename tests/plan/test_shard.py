"""Shards of plans: coordinates of all parts add up to the whole's, and a part gets the bits of the whole."""

from __future__ import annotations

import math
from itertools import pairwise
from operator import itemgetter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BASES, DTYPES, TILE, VARIANCE, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, Packing, PlanShard, fsdp

SEED, K = 11, 24


@st.composite
def cut_plans(draw: st.DrawFn) -> tuple[BlockPlan, list[PlanShard]]:
    """A plan, and its shards of ranges that follow one another in every tensor, empty ones among them."""
    numels = draw(st.lists(st.integers(1, 1500), min_size=1, max_size=5))
    granularity = draw(st.one_of(st.sampled_from(["tensor", "packed"]), st.integers(300, 2000)))
    named = [(f"p{i}", torch.empty(numel, requires_grad=True)) for i, numel in enumerate(numels)]
    plan = BlockPlan.from_parameters(named, K, granularity=granularity)
    count = draw(st.integers(1, 4))
    cuts = [
        [0, *sorted(draw(st.lists(st.integers(0, n), min_size=count - 1, max_size=count - 1))), n]
        for n in numels
    ]
    return plan, [plan.shard([(row[i], row[i + 1]) for row in cuts]) for i in range(count)]


def tensors(plan: BlockPlan, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(numel, seed + i, dtype) for i, (_, numel) in enumerate(plan.tensors)]


def sizes(plan: BlockPlan, old: list[Tensor], new: list[Tensor], basis: str) -> list[float]:
    """What is to be expected of the norm of each block's coordinates: ||delta|| / sqrt(rho K_l)."""
    norms = plan.block_norms_of_difference(old, new)
    return [
        norm * math.sqrt(block.numel / VARIANCE[basis] / block.k)
        for norm, block in zip(norms, plan.blocks, strict=True)
    ]


def parts(shard: PlanShard, whole: list[Tensor]) -> list[Tensor]:
    return [tensor[start:stop] for tensor, (start, stop) in zip(whole, shard.ranges, strict=True)]


@given(cut_plans(), st.sampled_from(BASES), st.sampled_from(DTYPES))
@settings(max_examples=40)
def test_coordinates_of_shards_add_up(
    cut: tuple[BlockPlan, list[PlanShard]], basis: ferret_ext.ops.Basis, dtype: torch.dtype
) -> None:
    """Where a tile is cut, its integers have other scales: 7e-7 in the root mean square."""
    plan, shards = cut
    old, new = tensors(plan, 1, dtype), tensors(plan, 2, dtype)
    whole = ferret_ext.project_difference(plan, old, new, SEED, basis=basis)
    each = [
        ferret_ext.project_difference(shard, parts(shard, old), parts(shard, new), SEED, basis=basis)
        for shard in shards
    ]
    assert all(gammas.shape == whole.shape and gammas.dtype == whole.dtype for gammas in each)
    total = torch.stack([gammas.double() for gammas in each]).sum(0)
    apart = plan.split(total - whole.double())
    assert all(
        float(a.norm()) <= 5e-6 * size for a, size in zip(apart, sizes(plan, old, new, basis), strict=True)
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 511), st.sampled_from(BASES))
@settings(max_examples=20)
def test_coordinates_of_shards_with_whole_tiles_add_up_closer(
    first: int, second: int, rest: int, basis: ferret_ext.ops.Basis
) -> None:
    """What is left is the rounding of each shard's coordinates."""
    numel = (first + second) * TILE + rest
    plan = BlockPlan.from_parameters([("p", torch.empty(numel, requires_grad=True))], K)
    old, new = tensors(plan, 1), tensors(plan, 2)
    cuts = [0, first * TILE, (first + second) * TILE, numel]
    total = torch.zeros(K, dtype=torch.float64)
    for start, stop in pairwise(cuts):
        shard = plan.shard([(start, stop)])
        total += ferret_ext.project_difference(shard, parts(shard, old), parts(shard, new), SEED, basis=basis)
    expected = ferret_ext.project_difference(plan, old, new, SEED, basis=basis)
    assert float((total - expected).norm()) <= 2e-7 * sizes(plan, old, new, basis)[0]


@given(cut_plans(), st.sampled_from(BASES), st.sampled_from(DTYPES))
@settings(max_examples=40)
def test_a_shard_gets_the_bits_of_the_whole(
    cut: tuple[BlockPlan, list[PlanShard]], basis: ferret_ext.ops.Basis, dtype: torch.dtype
) -> None:
    plan, shards = cut
    whole, before = tensors(plan, 3, dtype), tensors(plan, 3, dtype)
    updates = [(SEED, normal(K, 4), 0.25), (-5, normal(K, 5), 0.75)]
    ferret_ext.apply_(plan, whole, updates, -0.5, basis=basis)
    for shard in shards:
        own = [part.clone() for part in parts(shard, before)]
        ferret_ext.apply_(shard, own, updates, -0.5, basis=basis)
        for got, expected in zip(own, parts(shard, whole), strict=True):
            assert_same_bits(got, expected)


@given(cut_plans())
@settings(max_examples=20)
def test_packed_choices_do_so_too(cut: tuple[BlockPlan, list[PlanShard]]) -> None:
    """The best of 2^4 candidates of the sum, on a shard the same columns as on the whole."""
    plan, shards = cut
    packing = Packing(1, 4)
    old, new = tensors(plan, 1), tensors(plan, 2)
    each = [
        ferret_ext.project_difference(packing.candidates(shard), parts(shard, old), parts(shard, new), SEED)
        for shard in shards
    ]
    packed = ferret_ext.pack(plan, torch.stack(each).sum(0), packing)
    whole = [tensor.clone() for tensor in new]
    ferret_ext.apply_(plan, whole, [(SEED, packed, 1.0)], -0.5)
    for shard in shards:
        own = [part.clone() for part in parts(shard, new)]
        ferret_ext.apply_(shard, own, [(SEED, packed, 1.0)], -0.5)
        for got, expected in zip(own, parts(shard, whole), strict=True):
            assert_same_bits(got, expected)


@given(cut_plans())
@settings(max_examples=20)
def test_norms_of_shards_add_up(cut: tuple[BlockPlan, list[PlanShard]]) -> None:
    plan, shards = cut
    old, new = tensors(plan, 1), tensors(plan, 2)
    squares = torch.tensor(
        [shard.block_norms_of_difference(parts(shard, old), parts(shard, new)) for shard in shards]
    ).square()
    expected = torch.tensor(plan.block_norms_of_difference(old, new))
    torch.testing.assert_close(squares.sum(0).sqrt(), expected, rtol=1e-6, atol=0)


def test_pieces_of_a_shard() -> None:
    """Blocks of 400 over tensors of 700, 5 and 295 begin at 0, 512 and 1024 in the stream."""
    named = [(f"p{i}", torch.empty(n, requires_grad=True)) for i, n in enumerate((700, 5, 295))]
    plan = BlockPlan.from_parameters(named, K, granularity=400)
    shard = plan.shard([(350, 700), (5, 5), (0, 100)])
    assert shard.tensors == (("p0", 350), ("p1", 0), ("p2", 100))
    assert shard.pieces_table.tolist() == [
        [0, 0, 50, 350, 0],
        [0, 50, 300, 512, 1],
        [2, 0, 95, 817, 1],
        [2, 95, 5, 1024, 2],
    ]
    assert torch.equal(shard.blocks_table, plan.blocks_table)
    assert shard.with_counts([1, 2, 3]).K == 6


def test_a_shard_may_hold_nothing() -> None:
    plan = BlockPlan.from_parameters([("p", torch.empty(9, requires_grad=True))], 3)
    shard, nothing = plan.shard([(4, 4)]), [torch.empty(0)]
    assert torch.equal(ferret_ext.project_difference(shard, nothing, nothing, 0), torch.zeros(3))
    ferret_ext.apply_(shard, nothing, [(0, torch.ones(3), 1.0)], 1.0)


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        ([(0, 5)], "expected 2 ranges, one a tensor, got 1"),
        ([(0, 5), (0, 8)], r"stop of 'b' must be an int in \[0, 7\], got 8"),
        ([(6, 6), (0, 7)], r"start of 'a' must be an int in \[0, 5\], got 6"),
        ([(3, 2), (0, 7)], r"stop of 'a' must be an int in \[3, 5\], got 2"),
        ([(0, 5), (0.0, 7)], "start of 'b' must be an int"),
    ],
)
def test_ranges_that_do_not_fit(ranges: list[tuple[int, int]], text: str) -> None:
    plan = BlockPlan.from_parameters(
        [(n, torch.empty(d, requires_grad=True)) for n, d in (("a", 5), ("b", 7))], 2
    )
    with pytest.raises(ValueError, match=f"BlockPlan.shard: {text}"):
        plan.shard(ranges)


def test_tensors_that_do_not_fit_a_shard() -> None:
    plan = BlockPlan.from_parameters([("a", torch.empty(5, requires_grad=True))], 2)
    shard, wrong = plan.shard([(1, 4)]), [torch.ones(5)]
    with pytest.raises(ValueError, match=r"params\['a'\] must have 3 elements, got 5"):
        ferret_ext.apply_(shard, wrong, [(0, torch.ones(2), 1.0)], 1.0)
    with pytest.raises(ValueError, match="'a' must have 3 elements, got 5"):
        shard.block_norms_of_difference(wrong, wrong)


# ---- as FSDP2 cuts them


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 9))
def test_rows_go_to_ranks_as_torch_chunks_them(rows: int, width: int, size: int) -> None:
    chunks = [*torch.arange(rows * width).view(rows, width).chunk(size), *[torch.empty(0)] * size][:size]
    end = 0
    for rank, chunk in enumerate(chunks):
        start, stop = fsdp.row_range((rows, width), rank, size)
        assert (start, stop - start) == (end, chunk.numel())
        end = stop
    assert end == rows * width


def test_what_is_not_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter 0 must be a DTensor, got Parameter"):
        fsdp.ranges(list(torch.nn.Linear(2, 2).parameters()))


def test_eight_ranks_hold_every_element_of_a_7b_model_once() -> None:
    """Llama-2-7B as transformers has it by default, on the meta device; its shards in every block's order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        named = list(LlamaForCausalLM(LlamaConfig()).named_parameters())
    plan = BlockPlan.from_parameters(named, 4096, granularity=1 << 24)
    shapes = [param.shape for _, param in named]
    assert sum(numel for _, numel in plan.tensors) == 6_738_415_616
    tables = []
    for rank in range(8):
        ranges = [fsdp.row_range(shape, rank, 8) for shape in shapes]
        table = plan.shard(ranges).pieces_table
        table[:, 1] += torch.tensor([start for start, _ in ranges])[table[:, 0]]
        tables.append(table)
    rows = torch.cat(tables).tolist()
    for key, place in ((0, 1), (4, 3)):  # start within its tensor, offset within its block
        rows.sort(key=itemgetter(key, place))
        for one, two in pairwise(rows):
            assert two[key] != one[key] or two[place] == one[place] + one[2]
    assert sum(row[2] for row in rows) == 6_738_415_616
