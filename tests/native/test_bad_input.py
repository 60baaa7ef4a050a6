"""Every row of the bad-input table of docs/streams.md; errors name operator, argument, expected and got."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import DTYPES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, reference

PLAN = BlockPlan.from_parameters(
    [("a", torch.ones(700, requires_grad=True)), ("b", torch.ones(5, requires_grad=True))], 20
)


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(700, 1, dtype), normal(5, 2, dtype)]


# every operator with all of its arguments right; a test replaces one of them
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "project": (ferret_ext.project, {"delta": normal(700), "seed": 1, "K": 9}),
    "reconstruct": (ferret_ext.reconstruct, {"gamma": normal(9), "seed": 1, "shape": (700,)}),
    "reconstruct_": (ferret_ext.reconstruct_, {"param": normal(700), "gamma": normal(9), "seed": 1}),
    "basis": (ferret_ext.basis, {"seed": 1, "k": 0, "shape": (700,)}),
    "project_difference": (
        ferret_ext.project_difference,
        {"plan": PLAN, "old": tensors(), "new": tensors(), "seed": 1},
    ),
    "apply_": (
        ferret_ext.apply_,
        {"plan": PLAN, "params": tensors(), "updates": [(1, normal(20), 0.5)], "alpha": 0.1},
    ),
}


def call(op: str, **replaced: Any) -> Any:
    function, arguments = CALLS[op]
    return function(**{**arguments, **replaced})


def call_with(op: str, argument: str, value: Any) -> Any:
    return call(op, **{argument: value})


def rejects(op: str, error: type[Exception], *parts: object, **replaced: Any) -> None:
    """The call raises, and its text holds the operator's name and then the given parts in order."""
    pattern = ".*".join(re.escape(str(part)) for part in (f"{op}: ", *parts))
    with pytest.raises(error, match=f"^{pattern}"):
        call(op, **replaced)


@pytest.mark.parametrize("op", CALLS)
def test_every_operator_accepts_the_arguments_that_these_tests_vary(op: str) -> None:
    call(op)


# ---- numbers


@pytest.mark.parametrize("K", [0, -1, 2**32, 2**70])
def test_project_k_out_of_range(K: int) -> None:
    rejects("project", ValueError, "K", f"[1, {2**32 - 1}]", f"got {K}", K=K)


@pytest.mark.parametrize("K", [True, 2.0, "9", None])
def test_project_k_of_another_type(K: object) -> None:
    rejects("project", TypeError, "K", "int", "got", K=K)


@pytest.mark.parametrize("k", [-1, 2**32])
def test_basis_column_out_of_range(k: int) -> None:
    rejects("basis", ValueError, "k", f"[0, {2**32 - 1}]", f"got {k}", k=k)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
@pytest.mark.parametrize("op", CALLS)
def test_seed_out_of_range(op: str, seed: int) -> None:
    replaced = {"updates": [(seed, normal(20), 0.5)]} if op == "apply_" else {"seed": seed}
    rejects(op, ValueError, "seed", f"[{-(2**63)}, {2**64 - 1}]", f"got {seed}", **replaced)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
@pytest.mark.parametrize("op", CALLS)
def test_seed_at_the_ends_of_its_range_works(op: str, seed: int) -> None:
    call(op, **({"updates": [(seed, normal(20), 0.5)]} if op == "apply_" else {"seed": seed}))


@pytest.mark.parametrize("op", ["project", "reconstruct", "reconstruct_", "basis"])
def test_place_out_of_range(op: str) -> None:
    rejects(op, ValueError, "offset", "[0, ", "got -1", offset=-1)
    rejects(op, ValueError, "offset", f"{2**63 - 1 - 700}]", f"got {2**63 - 700}", offset=2**63 - 700)
    rejects(op, ValueError, "numel", "[700, ", "got 699", numel=699)
    rejects(op, TypeError, "offset", "int", "got float", offset=0.0)


@pytest.mark.parametrize("op", CALLS)
def test_basis_kind_unknown(op: str) -> None:
    rejects(op, ValueError, "basis", "rademacher, uniform, gaussian", "got 'normal'", basis="normal")


@pytest.mark.parametrize("op", ["reconstruct_", "apply_"])
def test_alpha_must_be_a_finite_number(op: str) -> None:
    rejects(op, ValueError, "alpha", "finite", "got nan", alpha=float("nan"))
    rejects(op, TypeError, "alpha", "float", "got str", alpha="1")


def test_apply_weight_must_be_finite() -> None:
    rejects(
        "apply_",
        ValueError,
        "weight of update 0",
        "finite",
        "got inf",
        updates=[(1, normal(20), float("inf"))],
    )


def test_reconstruct_shape_must_not_be_negative() -> None:
    rejects("reconstruct", ValueError, "shape", "got [3, -1]", shape=(3, -1))


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_delta_of_another_dtype(dtype: torch.dtype) -> None:
    wrong = torch.ones(700).to(dtype)
    rejects("project", TypeError, "delta", "float32, bfloat16, float16, float64", f"got {dtype}", delta=wrong)
    rejects("project_difference", TypeError, "old['a']", f"got {dtype}", old=[wrong, normal(5)])
    rejects("project_difference", TypeError, "new['a']", f"got {dtype}", new=[wrong, normal(5)])
    rejects("reconstruct_", TypeError, "param", f"got {dtype}", param=wrong)
    rejects("apply_", TypeError, "params['a']", f"got {dtype}", params=[wrong, normal(5)])
    rejects("reconstruct", TypeError, "dtype", f"got {dtype}", dtype=dtype)
    rejects("basis", TypeError, "dtype", f"got {dtype}", dtype=dtype)


@pytest.mark.parametrize("op", ["reconstruct", "reconstruct_"])
def test_gamma_of_another_dtype(op: str) -> None:
    rejects(
        op,
        TypeError,
        "gamma",
        "float32, bfloat16, float16, float64",
        "got torch.int64",
        gamma=torch.ones(9).long(),
    )


def test_delta_that_is_no_tensor() -> None:
    rejects("project", TypeError, "delta", "tensor", "got list", delta=[1.0, 2.0])
    rejects("project", TypeError, "delta", "dense", "sparse", delta=torch.eye(3).to_sparse())


# ---- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_not_finite(isa: str, value: float, dtype: torch.dtype) -> None:
    delta = torch.ones(7, 100, dtype=dtype)
    delta[2, 34] = delta[5, 1] = value
    for at, seen in ((delta, 234), (delta.T, 12)):
        parts = ("delta", "finite", "2 of 700", str(value), f"index {seen}")
        rejects("project", ValueError, *parts, delta=at)
    bad = [delta, normal(5)]
    rejects("project_difference", ValueError, "old['a']", "2 of 700", "index 234", old=bad)
    rejects("project_difference", ValueError, "new['a']", "2 of 700", "index 234", new=bad)


def test_difference_of_equal_infinities_is_not_finite() -> None:
    same = [torch.full((700,), float("inf")), normal(5)]
    rejects("project_difference", ValueError, "old['a']", "700 of 700", "index 0", old=same, new=same)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gamma_not_finite_leaves_parameters_untouched(isa: str, value: float) -> None:
    gamma, gammas = normal(9), normal(20)
    gamma[3] = gammas[11] = value
    param, params = normal(700, 3), tensors()
    rejects("reconstruct", ValueError, "gamma", "finite", "1 of 9", str(value), "index 3", gamma=gamma)
    rejects("reconstruct_", ValueError, "gamma", "1 of 9", "index 3", gamma=gamma, param=param)
    updates = [(1, normal(20), 0.5), (2, gammas, 0.5)]
    rejects("apply_", ValueError, "gammas of update 1", "1 of 20", "index 11", updates=updates, params=params)
    assert_same_bits(param, normal(700, 3))
    for after, before in zip(params, tensors(), strict=True):
        assert_same_bits(after, before)


def test_delta_too_large_for_the_coordinates() -> None:
    rejects("project", ValueError, "coordinates", "float32", delta=torch.full((10**5,), 3e38), K=1)


# ---- shapes


def layouts(x: Tensor) -> dict[str, Tensor]:
    """[30, 50] elements in many ways."""
    return {
        "transposed": x.reshape(50, 30).T,
        "rows": x.reshape(30, 50)[::2],
        "columns": x.reshape(30, 50)[:, 1::3],
        "narrowed": x[17:1300],
        "expanded": x[:50].expand(30, 50),
        "scalar expanded": x[0].expand(30, 50),
        "0-dim": x[3],
        "channels last": x.reshape(1, 3, 20, 25).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", layouts(normal(1500)))
def test_layout_of_delta_and_param_does_not_matter(name: str, dtype: torch.dtype) -> None:
    x = layouts(normal(1500, dtype=dtype))[name]
    assert_same_bits(ferret_ext.project(x, 4, 11), ferret_ext.project(x.contiguous().clone(), 4, 11))
    if "expanded" not in name:
        expected = ferret_ext.reconstruct_(x.clone(memory_format=torch.contiguous_format), normal(11), 4)
        returned = ferret_ext.reconstruct_(x, normal(11), 4)
        assert returned is x
        assert_same_bits(x, expected)


def test_layout_of_gamma_does_not_matter() -> None:
    strided, expanded = normal(33)[::3], normal(1).expand(11)
    for gamma in (strided, expanded):
        assert_same_bits(ferret_ext.reconstruct(gamma, 4, 700), ferret_ext.reconstruct(gamma.clone(), 4, 700))


def test_elements_of_strided_params_in_between_stay_untouched() -> None:
    memory = normal(1000)
    ferret_ext.reconstruct_(memory[::2], normal(5), 4)
    assert_same_bits(memory[1::2].clone(), normal(1000)[1::2].clone())
    assert (memory[::2] != normal(1000)[::2]).any()


@pytest.mark.parametrize("basis", ["rademacher", "uniform", "gaussian"])
def test_zero_length_gives_zeros(basis: str) -> None:
    for shape in ((0,), (3, 0), (0, 5)):
        empty = torch.zeros(shape)
        assert_same_bits(ferret_ext.project(empty, 1, 6, basis=basis), torch.zeros(6))
        assert_same_bits(ferret_ext.project(empty, 1, 6, basis=basis, offset=9, numel=100), torch.zeros(6))
        assert ferret_ext.reconstruct(normal(6), 1, shape, basis=basis).shape == shape
        assert ferret_ext.basis(1, 0, shape, basis=basis).shape == shape
        assert ferret_ext.reconstruct_(empty, normal(6), 1, basis=basis).shape == shape
    assert ferret_ext.project(torch.zeros(0, dtype=torch.float64), 1, 6).dtype == torch.float64


def test_zero_dim_tensors_work() -> None:
    gamma = ferret_ext.project(torch.tensor(2.0), 1, 6)
    assert_same_bits(gamma, reference.project(torch.tensor(2.0), 1, 6))
    assert ferret_ext.reconstruct(gamma, 1, ()).shape == ()
    assert ferret_ext.basis(1, 0, ()).abs() == 1


@pytest.mark.parametrize("op", ["reconstruct", "reconstruct_"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 3)])
def test_gamma_of_another_shape(op: str, shape: tuple[int, ...]) -> None:
    rejects(op, ValueError, "gamma", "[K]", f"got {list(shape)}", gamma=torch.ones(shape))


@pytest.mark.parametrize("length", [19, 21])
def test_gammas_of_another_length_than_the_plan(length: int) -> None:
    updates = [(1, normal(20), 0.5), (1, normal(length), 0.5)]
    rejects("apply_", ValueError, "gammas of update 1", 20, f"got {length}", updates=updates)


def test_tensors_that_do_not_fit_the_plan() -> None:
    for op, argument in (("project_difference", "old"), ("project_difference", "new"), ("apply_", "params")):
        rejects(op, ValueError, argument, 2, "got 1", **{argument: [normal(700)]})
        rejects(op, ValueError, f"{argument}['b']", 5, "got 6", **{argument: [normal(700), normal(6)]})


def test_plan_of_another_type() -> None:
    for op in ("project_difference", "apply_"):
        rejects(op, TypeError, "plan", "BlockPlan", "got dict", plan=PLAN.to_dict())
    with pytest.raises(TypeError, match=r"^project_difference: plan must be a BlockPlan, .* got list"):
        ferret_ext.project_difference(tensors(), tensors(), PLAN, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^pack: packing must be a Packing, got 'int4'"):
        ferret_ext.pack(PLAN, normal(20), "int4")  # type: ignore[arg-type]


def test_difference_of_a_transposed_tensor() -> None:
    """Flat ones hold the same elements in the same order; these do not."""
    new = [normal(700).view(7, 100), normal(5)]
    expected = call("project_difference", new=[normal(700), normal(5)])
    assert_same_bits(call("project_difference", new=new), expected)
    old = [normal(700, 1).view(100, 7), normal(5, 2)]
    rejects(
        "project_difference", ValueError, "old['a']", "new['a']", "[7, 100]", "[100, 7]", old=old, new=new
    )


# ---- devices and autograd


def test_forward_mode_is_refused_not_ignored() -> None:
    for op, argument in (("project", "delta"), ("reconstruct", "gamma"), ("reconstruct_", "gamma")):
        value = CALLS[op][1][argument]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
            rejects(op, TypeError, argument, "tangent", **{argument: dual})
        with pytest.raises(TypeError, match=f"^{op}: {argument} must have no tangent"):
            torch.func.jvp(partial(call_with, op, argument), (value,), (torch.ones_like(value),))


def test_tensors_on_different_devices() -> None:
    there = torch.ones(700, device="meta")
    rejects("reconstruct_", ValueError, "gamma", "param", "meta", "got cpu", param=there)
    rejects("project_difference", ValueError, "['a']", "cpu", "meta", new=[there, normal(5)])
    rejects("apply_", ValueError, "['b']", "meta", "got cpu", params=[there, normal(5)])
    rejects("apply_", ValueError, "gammas of update 0", "meta", "got cpu", params=[there, there[:5]])


@pytest.mark.parametrize("op", ["reconstruct_", "apply_"])
def test_inplace_on_a_leaf_is_torchs_own_error(op: str) -> None:
    leaf = normal(700).requires_grad_()
    replaced = {"param": leaf} if op == "reconstruct_" else {"params": [leaf, normal(5)]}
    with pytest.raises(
        RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"
    ):
        call(op, **replaced)
    assert_same_bits(leaf, normal(700))
    with torch.no_grad():
        call(op, **replaced)
    assert (leaf != normal(700)).any()
