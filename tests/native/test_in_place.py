"""In-place operators change what they should, all of it or nothing."""

import pytest
import torch
from support import assert_same_bits, normal

import ferret_ext
from ferret_ext import BlockPlan


def two_blocks() -> BlockPlan:
    parameters = [(name, torch.nn.Parameter(torch.zeros(10))) for name in "ab"]
    return BlockPlan.from_parameters(parameters, 4)


UPDATE = [(1, torch.ones(4), 1.0)]


@pytest.mark.parametrize("second", [torch.zeros(1).expand(10), torch.zeros(14).as_strided((5, 2), (2, 2))])
def test_apply_refuses_a_parameter_that_overlaps_itself(second: torch.Tensor) -> None:
    first = torch.zeros(10)
    with pytest.raises(ValueError, match=r"apply_: params\['b'\] must not overlap itself"):
        ferret_ext.apply_(two_blocks(), [first, second], UPDATE, 1.0)
    assert not first.any()


@pytest.mark.parametrize("stride", [1, 2])
def test_apply_refuses_one_parameter_given_twice(stride: int) -> None:
    param = torch.zeros(10, stride)[:, 0]
    with pytest.raises(ValueError, match=r"must not share memory, got params\['a'\] and params\['b'\]"):
        ferret_ext.apply_(two_blocks(), [param, param], UPDATE, 1.0)


def test_apply_takes_columns_of_one_matrix() -> None:
    together = torch.zeros(10, 2)
    apart = [torch.zeros(10), torch.zeros(10)]
    ferret_ext.apply_(two_blocks(), [together[:, 0], together[:, 1]], UPDATE, 1.0)
    ferret_ext.apply_(two_blocks(), apart, UPDATE, 1.0)
    assert_same_bits(together, torch.stack(apart, 1))


@pytest.mark.parametrize("weight", [1e39, -1e300, 10**400, float("nan")])
def test_apply_refuses_a_weight_beyond_the_working_precision(weight: float) -> None:
    params = [torch.zeros(10), torch.zeros(10)]
    with pytest.raises(ValueError, match="apply_: weight of update 0 must be finite and at most"):
        ferret_ext.apply_(two_blocks(), params, [(1, torch.ones(4), weight)], 1e-39)
    assert not any(param.any() for param in params)


@pytest.mark.parametrize("update", [None, (3, torch.ones(4)), 5])
def test_apply_says_what_an_update_is(update: object) -> None:
    with pytest.raises(TypeError, match=r"apply_: update 0 must be \(seed, gammas, weight\)"):
        ferret_ext.apply_(two_blocks(), [torch.zeros(10), torch.zeros(10)], [update], 1.0)  # type: ignore[list-item]


def test_apply_takes_generators_and_numpy_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    params = [torch.zeros(10), torch.zeros(10)]
    expected = [torch.zeros(10), torch.zeros(10)]
    updates = ((numpy.int64(1), torch.ones(4), numpy.float32(0.5)) for _ in range(1))
    ferret_ext.apply_(two_blocks(), iter(params), updates, numpy.float32(2))
    ferret_ext.apply_(two_blocks(), expected, UPDATE, 1.0)
    for got, want in zip(params, expected, strict=True):
        assert_same_bits(got, want)


def test_in_place_refuses_an_inference_tensor_as_torch_does() -> None:
    with torch.inference_mode():
        param = torch.zeros(10)
        ferret_ext.reconstruct_(param, torch.ones(4), 1)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        ferret_ext.reconstruct_(param, torch.ones(4), 1)


def test_changing_a_table_does_not_change_the_plan() -> None:
    plan = two_blocks()
    plan.blocks_table[0, 1] = 10**9
    assert plan.blocks_table[0, 1] == 10


@pytest.mark.parametrize("device", ["meta"])
def test_shapes_are_known_without_values(device: str) -> None:
    assert ferret_ext.project(torch.empty(3, device=device), 1, 4).shape == (4,)
    assert ferret_ext.reconstruct(torch.empty(4), 1, (2, 3), device=device).shape == (2, 3)


def test_gradient_of_project_passes_nan_on() -> None:
    delta = normal(300).requires_grad_()
    (ferret_ext.project(delta, 1, 4) * float("nan")).sum().backward()
    assert delta.grad is not None
    assert delta.grad.isnan().all()


@pytest.mark.parametrize("shape", [(2**40, 2**40), (-1,), 2**63])
def test_reconstruct_refuses_a_shape_beyond_64_bits(shape: object) -> None:
    with pytest.raises((ValueError, TypeError), match="reconstruct: shape must be"):
        ferret_ext.reconstruct(torch.ones(3), 1, shape)  # type: ignore[arg-type]
