"""What block plans refuse, and that the text says what was expected and what it got."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ferret_ext import Block, BlockPlan

TENSORS = (("a", 600), ("b", 5))
BLOCKS = (Block("a", 0, 600, 7), Block("b", 1024, 5, 3))
PLAN = BlockPlan(TENSORS, BLOCKS)


def named(*numels: int) -> list[tuple[str, Tensor]]:
    return [(f"p{i}", torch.ones(numel, requires_grad=True)) for i, numel in enumerate(numels)]


@pytest.mark.parametrize("K", [0, -3, 2**63, True, 2.0, "9", None])
def test_k_out_of_range_or_of_another_type(K: Any) -> None:
    with pytest.raises(ValueError, match=r"K must be an int in \[1, .*got " + repr(K)):
        BlockPlan.from_parameters(named(5), K)


def test_k_below_the_number_of_blocks() -> None:
    with pytest.raises(ValueError, match=r"got K = 2 for 3 blocks; raise K or use a coarser granularity"):
        BlockPlan.from_parameters(named(5, 5, 5), 2)
    with pytest.raises(ValueError, match=r"got K = 1 for 2 blocks"):
        PLAN.with_allocation("equal", K=1)


def test_k_too_large_for_a_block() -> None:
    with pytest.raises(
        ValueError, match=rf"k of block 'p0' must be an int in \[1, {2**32 - 1}\], got {2**32}"
    ):
        BlockPlan.from_parameters(named(5), 2**32)


@pytest.mark.parametrize("granularity", ["layer", 0, -1, 1.5, True, None])
def test_granularity_unknown(granularity: Any) -> None:
    with pytest.raises(
        ValueError, match='granularity must be "tensor", "packed", "joined" or an int >= 1, got '
    ):
        BlockPlan.from_parameters(named(5), 3, granularity=granularity)


def test_allocation_unknown() -> None:
    with pytest.raises(
        ValueError,
        match="allocation must be one of size, sqrt-size, equal, norm, sqrt-norm, mse, curvature, got 'best'",
    ):
        BlockPlan.from_parameters(named(5), 3, allocation="best")


@pytest.mark.parametrize("allocation", ["norm", "sqrt-norm", "mse", "curvature"])
def test_norms_missing_or_unfit(allocation: Any) -> None:
    for norms, text in (
        (None, "expected 2, got none"),
        ([1.0], "expected 2, got 1"),
        ([1.0, float("nan")], "finite and >= 0, got nan for block 1"),
        ([float("inf"), 1.0], "finite and >= 0, got inf for block 0"),
        ([1.0, -0.5], "finite and >= 0, got -0.5 for block 1"),
    ):
        with pytest.raises(ValueError, match=text):
            PLAN.with_allocation(allocation, norms=norms)


@pytest.mark.parametrize(
    "parameters", [[], [("frozen", torch.ones(5))], [("empty", torch.ones(0, requires_grad=True))]]
)
def test_no_parameters_left(parameters: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="expected a non-empty parameter that requires grad, got none"):
        BlockPlan.from_parameters(parameters, 3)


def test_parameters_of_one_name() -> None:
    with pytest.raises(ValueError, match="tensor names must differ, got 'p0' more than once"):
        BlockPlan.from_parameters([*named(5), *named(6)], 3)


@pytest.mark.parametrize(
    ("tensors", "blocks", "text"),
    [
        ((), BLOCKS, "at least one tensor, got none"),
        ((("a", 0),), BLOCKS, r"numel of tensor 'a' must be an int in \[1, .*got 0"),
        ((("", 5),), BLOCKS, "name of a tensor must be a non-empty str, got ''"),
        (TENSORS, BLOCKS[:1], "blocks must cover the tensors' 605 elements, got 600"),
        (
            TENSORS,
            (Block("a", 0, 600, 7), Block("b", 512, 5, 3)),
            "'b' must start at a multiple of 512 and not before 600, got 512",
        ),
        (
            TENSORS,
            (Block("a", 0, 600, 7), Block("b", 600, 5, 3)),
            "'b' must start at a multiple of 512 and not before 600, got 600",
        ),
        (
            TENSORS,
            (Block("a", -512, 600, 7), BLOCKS[1]),
            r"offset of block 'a' must be an int in \[0, .*got -512",
        ),
        (TENSORS, (Block("a", 0, 600, 0), BLOCKS[1]), r"k of block 'a' must be an int in \[1, .*got 0"),
        (TENSORS, (BLOCKS[0], Block("b", 2**63 - 512, 5000, 3)), "numel of block 'b' must be an int"),
    ],
)
def test_plan_of_parts_that_do_not_fit(tensors: Any, blocks: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BlockPlan(tensors, blocks)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("format",), 2, "expected format 1, got 2"),
        (("tensors",), None, "tensors must be a list of rows of 2 values, got None"),
        (("tensors", 0), ["a"], "tensors must be a list of rows of 2 values"),
        (("blocks", 0), ["a", 0, 600], "blocks must be a list of rows of 4 values"),
        (("blocks", 0, 1), "0", "offset of block 'a' must be an int"),
        (("blocks", 0, 2), 601, "cover the tensors' 605 elements, got 606"),
        (("blocks", 0, 3), 7.0, "k of block 'a' must be an int"),
        (("blocks", 0, 0), 5, "name of a block must be a non-empty str, got 5"),
        (("surprise",), 1, "expected the keys blocks, format, tensors, got .*surprise"),
    ],
)
def test_from_dict_of_what_to_dict_never_wrote(path: tuple[Any, ...], value: Any, text: str) -> None:
    data = copy.deepcopy(PLAN.to_dict())
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=text):
        BlockPlan.from_dict(data)


def test_from_dict_of_no_dict() -> None:
    with pytest.raises(ValueError, match="expected the keys blocks, format, tensors, got list"):
        BlockPlan.from_dict([])


@pytest.mark.parametrize("shape", [(9,), (11,), (), (2, 5)])
def test_split_of_another_length(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"gammas must have shape \[10\], got \[" + ", ".join(map(str, shape))
    ):
        PLAN.split(torch.ones(shape))


@pytest.mark.parametrize(
    ("numels", "text"), [((600,), "expected 2 tensors, got 1"), ((600, 6), "'b' must have 5 elements, got 6")]
)
def test_tensors_that_do_not_fit(numels: tuple[int, ...], text: str) -> None:
    fits, wrong = [torch.ones(600), torch.ones(5)], [torch.ones(numel) for numel in numels]
    with pytest.raises(ValueError, match=text):
        PLAN.block_norms(wrong)
    with pytest.raises(ValueError, match=text):
        PLAN.block_norms_of_difference(fits, wrong)
    with pytest.raises(ValueError, match=text):
        PLAN.block_norms_of_difference(wrong, fits)


def test_select_of_a_missing_or_unfit_name() -> None:
    with pytest.raises(ValueError, match="'b' is missing"):
        PLAN.select({"a": torch.ones(600)})
    with pytest.raises(ValueError, match="'b' must have 5 elements, got 6"):
        PLAN.select({"a": torch.ones(600), "b": torch.ones(6)})
