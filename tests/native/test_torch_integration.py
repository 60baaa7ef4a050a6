"""The operators as citizens of torch: schemas, fake kernels, torch.compile, autograd, threads."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from support import BASES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan

KINDS = (1, 2, 3)
OPS = torch.ops.ferret


def small_plan() -> BlockPlan:
    named = [("a", torch.ones(600, requires_grad=True)), ("b", torch.ones(40, requires_grad=True))]
    return BlockPlan.from_parameters(named, 12, granularity=500)


def tensors(seed: int) -> list[Tensor]:
    return [normal(600, seed), normal(40, seed + 1)]


# ---- opcheck


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_project(kind: int, dtype: torch.dtype) -> None:
    delta = normal(600, dtype=dtype).view(20, 30)
    torch.library.opcheck(OPS.project, (delta.requires_grad_(), 5, 9, kind, 77, 1000))
    torch.library.opcheck(OPS.project, (delta.detach().T, 5, 9, kind, 77, 1000))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_reconstruct(kind: int, dtype: torch.dtype) -> None:
    gamma = normal(9, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    torch.library.opcheck(OPS.reconstruct, (gamma, 5, 600, kind, 77, 1000, dtype))


def test_opcheck_basis() -> None:
    torch.library.opcheck(OPS.basis_, (torch.empty(600), 5, 3, 1, 77, 1000))


def test_opcheck_project_blocks() -> None:
    plan = small_plan()
    tables = (plan.blocks_table, plan.pieces_table)
    torch.library.opcheck(OPS.project_blocks, (tensors(1), tensors(3), *tables, plan.K, 5, 1))


def test_opcheck_apply_blocks() -> None:
    plan = small_plan()
    tables = (plan.blocks_table, plan.pieces_table)
    gammas = normal(2 * plan.K).view(2, plan.K)
    torch.library.opcheck(OPS.apply_blocks_, (tensors(1), *tables, gammas, [5, 6], [0.5, 0.25], -0.3, 1))


# ---- torch.compile


def round_trip(delta: Tensor) -> Tensor:
    gamma = ferret_ext.project(delta * 2, 5, 9, basis="uniform", offset=77, numel=1000)
    return ferret_ext.reconstruct(gamma, 5, delta.shape, basis="uniform", offset=77, numel=1000) + 1


def update_in_place(param: Tensor) -> Tensor:
    with torch.no_grad():
        changed = param.clone()
        ferret_ext.reconstruct_(changed, torch.ones(9), 5, alpha=0.5)
        return changed * 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [round_trip, update_in_place])
def test_compile_fullgraph_gives_the_same_bits(function: Callable[[Tensor], Tensor], backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for seed in (0, 1):
        assert_same_bits(compiled(normal(600, seed)), function(normal(600, seed)))


def test_compile_fullgraph_of_plan_operators_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    plan = small_plan()

    def compute(old: list[Tensor], new: list[Tensor]) -> Tensor:
        gammas = ferret_ext.project_difference(plan, old, new, 5)
        changed = [tensor.clone() for tensor in new]
        ferret_ext.apply_(plan, changed, [(5, gammas, 1.0), (6, gammas, -0.5)], 0.5)
        return torch.cat(changed) * 2

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(tensors(1), tensors(3)), compute(tensors(1), tensors(3)))


def test_compile_follows_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ferret_ext.project(x, 5, 9), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for count in (600, 513, 1200):
        assert_same_bits(compiled(normal(count)), ferret_ext.project(normal(count), 5, 9))


def test_compile_differentiates() -> None:
    torch._dynamo.reset()
    expected, got = (normal(600).requires_grad_() for _ in range(2))
    round_trip(expected).square().sum().backward()
    torch.compile(round_trip, fullgraph=True, backend="aot_eager")(got).square().sum().backward()
    assert_same_bits(got.grad, expected.grad)


# ---- autograd


@pytest.mark.parametrize("basis", BASES)
def test_gradcheck_project(basis: str) -> None:
    delta = normal(60, dtype=torch.float64).view(6, 10).requires_grad_()
    place = {"basis": basis, "offset": 500, "numel": 100}
    assert torch.autograd.gradcheck(lambda x: ferret_ext.project(x, 5, 7, **place), delta)
    assert torch.autograd.gradgradcheck(lambda x: ferret_ext.project(x, 5, 7, **place), delta)


@pytest.mark.parametrize("basis", BASES)
def test_gradcheck_reconstruct(basis: str) -> None:
    gamma = normal(7, dtype=torch.float64).requires_grad_()
    place = {"basis": basis, "offset": 500, "numel": 100, "dtype": torch.float64}
    assert torch.autograd.gradcheck(lambda g: ferret_ext.reconstruct(g, 5, (6, 10), **place), gamma)
    assert torch.autograd.gradgradcheck(lambda g: ferret_ext.reconstruct(g, 5, (6, 10), **place), gamma)


@pytest.mark.parametrize("basis", BASES)
def test_gradient_of_project_is_the_reconstruction_of_the_gradient(basis: str) -> None:
    """d<gamma, w>/d delta = V w / (rho K), in the dtype of delta."""
    delta, w = normal(900, dtype=torch.bfloat16).requires_grad_(), normal(7, 1)
    (ferret_ext.project(delta, 5, 7, basis=basis) @ w).backward()
    rho = {"rademacher": 1.0, "uniform": 21845 / 65536, "gaussian": 1.0}[basis] / 900
    expected = ferret_ext.reconstruct(w, 5, (900,), basis=basis) / (rho * 7)
    assert delta.grad is not None
    assert delta.grad.dtype == torch.bfloat16
    torch.testing.assert_close(delta.grad.float(), expected, rtol=2**-7, atol=0)


def test_inplace_change_is_seen_by_autograd() -> None:
    """A tensor saved for backward and then changed in place must not be used silently."""
    weight = normal(600).requires_grad_()
    saved = weight.exp()
    loss = saved.square().sum()
    with torch.no_grad():
        ferret_ext.reconstruct_(saved, normal(5), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- threads


def test_operators_release_the_gil() -> None:
    """A Python thread keeps running while project works."""
    delta, ticks, stop = normal(1 << 21), [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        K, elapsed, ticked = 256, 0.0, 0
        while elapsed < 0.2:
            before, start = ticks[0], time.perf_counter()
            torch.ops.ferret.project(delta, 1, K, 1, 0, delta.numel())
            elapsed, ticked = time.perf_counter() - start, ticks[0] - before
            K *= 2
    finally:
        stop.set()
        thread.join()
    assert ticked >= 5, f"{ticked} ticks of a millisecond in {elapsed:.2f} s"
