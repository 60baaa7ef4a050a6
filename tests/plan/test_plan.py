"""Block plans: what becomes a block, where blocks lie in the stream, and that plans travel unchanged."""

import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import TILE, assert_same_bits, normal
from torch import Tensor, nn

from ferret_ext import Block, BlockPlan


def parameters(*numels: int) -> list[tuple[str, Tensor]]:
    return [(f"p{i}", torch.ones(numel, requires_grad=True)) for i, numel in enumerate(numels)]


def numels(plan: BlockPlan) -> list[int]:
    return [block.numel for block in plan.blocks]


granularities = st.one_of(st.sampled_from(["tensor", "packed", "joined"]), st.integers(1, 3000))
sizes = st.lists(st.integers(1, 2000), min_size=1, max_size=12)


# ---- blocks


def test_granularity_tensor_makes_a_block_a_parameter() -> None:
    plan = BlockPlan.from_parameters(parameters(700, 5, 2048), 30)
    assert [(block.name, block.numel) for block in plan.blocks] == [("p0", 700), ("p1", 5), ("p2", 2048)]
    assert plan.tensors == (("p0", 700), ("p1", 5), ("p2", 2048))


def test_granularity_packed_closes_a_block_at_nine_tenths_of_the_median() -> None:
    # median 100, so a block closes at 90 elements or more; the last one takes what is left
    plan = BlockPlan.from_parameters(
        parameters(10, 80, 100, 1000, 89, 100, 300, 100, 20), 30, granularity="packed"
    )
    assert numels(plan) == [90, 100, 1000, 189, 300, 100, 20]
    assert [block.name for block in plan.blocks] == ["p0..p1", "p2", "p3", "p4..p5", "p6", "p7", "p8"]


def test_granularity_joined_closes_a_block_at_the_size_of_two_coordinates() -> None:
    # 2 * 1000 / 20, so a block closes at 100 elements or more
    plan = BlockPlan.from_parameters(parameters(60, 40, 500, 99, 1, 280, 20), 20, granularity="joined")
    assert numels(plan) == [100, 500, 100, 280, 20]
    assert [block.name for block in plan.blocks] == ["p0..p1", "p2", "p3..p4", "p5", "p6"]


@given(sizes, st.integers(1, 30))
def test_granularity_joined_has_blocks_for_any_k(counts: list[int], K: int) -> None:
    plan = BlockPlan.from_parameters(parameters(*counts), K, granularity="joined", allocation="sqrt-size")
    assert plan.K == K
    assert len(plan.blocks) <= K // 2 + 1


def test_granularity_int_cuts_the_concatenation() -> None:
    plan = BlockPlan.from_parameters(parameters(700, 5, 295), 30, granularity=400)
    assert numels(plan) == [400, 400, 200]
    assert [block.name for block in plan.blocks] == ["[0:400]", "[400:800]", "[800:1000]"]
    assert plan.pieces_table.tolist() == [
        [0, 0, 400, 0, 0],
        [0, 400, 300, 512, 1],
        [1, 0, 5, 812, 1],
        [2, 0, 95, 817, 1],
        [2, 95, 200, 1024, 2],
    ]


def test_granularity_int_beyond_the_total_makes_one_block() -> None:
    assert numels(BlockPlan.from_parameters(parameters(700, 5), 3, granularity=10**9)) == [705]


def test_offsets_are_running_sums_rounded_up_to_tiles() -> None:
    plan = BlockPlan.from_parameters(parameters(512, 1, 513, 7), 30)
    assert [block.offset for block in plan.blocks] == [0, 512, 1024, 2048]


def test_from_parameters_leaves_out_frozen_empty_and_tied_parameters() -> None:
    tied = torch.ones(7, requires_grad=True)
    named = [
        ("tied", tied),
        ("frozen", torch.ones(5)),
        ("empty", torch.ones(0, requires_grad=True)),
        ("again", tied),
        ("equal", torch.ones(7, requires_grad=True)),
    ]
    assert BlockPlan.from_parameters(named, 9).tensors == (("tied", 7), ("equal", 7))


def test_from_parameters_takes_a_model() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 2))
    plan = BlockPlan.from_parameters(model.named_parameters(), 50)
    assert plan.tensors == (("0.weight", 1200), ("0.bias", 40), ("1.weight", 80), ("1.bias", 2))
    selected = plan.select(model.named_parameters())
    assert all(a is b for a, b in zip(selected, model.parameters(), strict=True))


@given(sizes, granularities, st.integers(0, 500))
def test_plan_cuts_every_element_into_exactly_one_block(
    counts: list[int], granularity: object, spare: int
) -> None:
    total = sum(counts)
    plan = BlockPlan.from_parameters(parameters(*counts), total + spare, granularity=granularity)
    assert plan.K == sum(block.k for block in plan.blocks) == total + spare
    assert min(block.k for block in plan.blocks) >= 1
    assert sum(numels(plan)) == total
    for block, following in zip(plan.blocks, plan.blocks[1:], strict=False):
        assert block.offset % TILE == 0
        assert block.offset + block.numel <= following.offset < block.offset + block.numel + TILE


def test_divided_cuts_blocks_of_many_coordinates_into_equal_pieces() -> None:
    """Elements and coordinates alike; a piece has 1024 elements at least."""
    blocks = (Block("a", 0, 5000, 20), Block("b", 5120, 2500, 90), Block("c", 7680, 9, 8))
    plan = BlockPlan((("p", 7000), ("q", 509)), blocks).divided(8)
    assert [(block.name, block.numel, block.k) for block in plan.blocks] == [
        ("a[0:1666]", 1666, 6),
        ("a[1666:3333]", 1667, 7),
        ("a[3333:5000]", 1667, 7),
        ("b[0:1250]", 1250, 45),
        ("b[1250:2500]", 1250, 45),
        ("c", 9, 8),
    ]
    assert [block.offset for block in plan.blocks] == [0, 2048, 4096, 6144, 7680, 9216]
    assert plan.divided(8).K == plan.K == 118
    assert plan.divided(200) == plan


@given(st.lists(st.integers(1, 20000), min_size=1, max_size=6), st.integers(6, 3000), st.integers(1, 200))
def test_divided_keeps_the_error_and_saves_work(counts: list[int], K: int, most: int) -> None:
    """Of an update of equal elements, sum d_l^2 / K_l changes by what whole numbers leave over alone."""
    plan = BlockPlan.from_parameters(parameters(*counts), max(K, len(counts)), allocation="sqrt-size")
    cut = plan.divided(most)
    assert (cut.tensors, cut.K) == (plan.tensors, plan.K)
    assert all(block.k <= most or block.numel < 2048 for block in cut.blocks)
    assert sum(numels(cut)) == sum(counts)
    assert min(block.k for block in cut.blocks) >= 1
    work = [sum(block.numel * block.k for block in it.blocks) for it in (plan, cut)]
    assert work[1] <= work[0]
    for block in plan.blocks:
        inside = [it for it in cut.blocks if it.name == block.name or it.name.startswith(f"{block.name}[")]
        assert sum(it.k for it in inside) == block.k
        densities = [it.k / it.numel for it in inside]
        assert (
            max(abs(density * block.numel / block.k - 1) for density in densities) < 2 * len(inside) / block.k
        )


def test_divided_refuses_less_than_one() -> None:
    with pytest.raises(ValueError, match=r"BlockPlan.divided: most must be an int in \[1, .* got 0"):
        BlockPlan.from_parameters(parameters(9), 3).divided(0)


@given(sizes, granularities)
def test_pieces_rebuild_the_blocks_from_the_tensors(counts: list[int], granularity: object) -> None:
    plan = BlockPlan.from_parameters(parameters(*counts), sum(counts), granularity=granularity)
    tensors = [torch.arange(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
    blocks: list[list[Tensor]] = [[] for _ in plan.blocks]
    for tensor, start, length, offset, index in plan.pieces_table.tolist():
        assert offset == plan.blocks[index].offset + sum(map(len, blocks[index]))
        blocks[index].append(tensors[tensor][start : start + length])
    rebuilt = [torch.cat(parts) for parts in blocks]
    assert [len(values) for values in rebuilt] == numels(plan)
    assert torch.cat(rebuilt).tolist() == list(range(sum(counts)))


# ---- tables, views, norms


def test_blocks_table_lists_offset_numel_k_start() -> None:
    plan = BlockPlan.from_parameters(parameters(600, 5, 40), 10, allocation="equal")
    assert plan.starts == (0, 4, 7)
    assert plan.blocks_table.dtype == plan.pieces_table.dtype == torch.int64
    assert plan.blocks_table.tolist() == [[0, 600, 4, 0], [1024, 5, 3, 4], [1536, 40, 3, 7]]


def test_split_gives_views_by_block() -> None:
    plan = BlockPlan.from_parameters(parameters(600, 5, 40), 10, allocation="equal")
    gammas = torch.arange(10.0)
    parts = plan.split(gammas)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    parts[1].zero_()
    assert gammas[4:7].tolist() == [0, 0, 0]


@pytest.mark.parametrize("granularity", ["tensor", "packed", 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_block_norms_are_those_of_the_concatenation(granularity: str | int, dtype: torch.dtype) -> None:
    plan = BlockPlan.from_parameters(parameters(700, 5, 2048), 30, granularity=granularity)
    old, new = ([normal(n, seed + i, dtype) for i, (_, n) in enumerate(plan.tensors)] for seed in (0, 50))
    kept = [tensor.clone() for tensor in old]
    for got, flat in (
        (plan.block_norms(old), torch.cat(old).double()),
        (plan.block_norms_of_difference(old, new), torch.cat(old).double() - torch.cat(new).double()),
    ):
        expected = [torch.linalg.vector_norm(part).item() for part in flat.split(numels(plan))]
        assert got == pytest.approx(expected, rel=1e-14)
    for tensor, before in zip(old, kept, strict=True):
        assert_same_bits(tensor, before)


def test_block_norms_take_parameters_of_a_graph() -> None:
    plan = BlockPlan.from_parameters(parameters(9, 4), 2)
    assert plan.block_norms([tensor for _, tensor in parameters(9, 4)]) == [3.0, 2.0]


# ---- values that travel


def example() -> BlockPlan:
    return BlockPlan.from_parameters(parameters(700, 5, 2048), 30, granularity=600)


def test_plan_is_a_frozen_value() -> None:
    plan = example()
    assert plan == example()
    assert hash(plan) == hash(example())
    assert plan != plan.with_allocation("equal")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.blocks = ()


@given(sizes, granularities)
def test_plan_survives_json_and_pickle(counts: list[int], granularity: object) -> None:
    plan = BlockPlan.from_parameters(parameters(*counts), sum(counts) + 9, granularity=granularity)
    for copy in (
        BlockPlan.from_dict(json.loads(json.dumps(plan.to_dict()))),
        pickle.loads(pickle.dumps(plan)),
    ):
        assert copy == plan
        assert copy.digest() == plan.digest()
        assert copy.blocks_table.tolist() == plan.blocks_table.tolist()


def test_digest_is_the_sha256_of_canonical_json() -> None:
    """A value written down once: clients of other versions and machines must find the same."""
    plan = BlockPlan((("a", 3), ("é", 600)), (Block("a", 0, 3, 1), Block("é", 512, 600, 7)))
    assert plan.digest() == "524a21817b13775b62e7e8d1668ddd624620b506f7d8a170dc12b46a0e18f36e"


def test_digest_tells_plans_apart() -> None:
    plan = example()
    others = [
        plan.with_allocation("equal"),
        plan.with_allocation("size", K=31),
        dataclasses.replace(plan, tensors=(("q", 700), *plan.tensors[1:])),
        dataclasses.replace(plan, blocks=(*plan.blocks[:-1], dataclasses.replace(plan.blocks[-1], name="x"))),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 5
