"""Results against the plain formulas in float64: the contract's third promise, on kind and unkind inputs.

The promised bounds are relative. Where a result is so small that its own format is coarser than that, half of
the format's smallest number is allowed for every element besides.
"""

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from support import BASES, DTYPES, VARIANCE, normal
from torch import Tensor

import ferret_ext
from ferret_ext import reference

SEED, COUNT, K = 77, 2600, 16
Make = Callable[[int, torch.dtype], Tensor]
PROJECT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float64: 1e-11}
RECONSTRUCT_BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def gaussian(count: int, dtype: torch.dtype) -> Tensor:
    return normal(count, 1, dtype)


def constant(count: int, dtype: torch.dtype) -> Tensor:
    return torch.full((count,), 0.1, dtype=dtype)


def heavy_tailed(count: int, dtype: torch.dtype) -> Tensor:
    """One element 1e6 times the rest; float16 reaches that with the rest denormal."""
    x = normal(count, 2, torch.float64) * (0.01 if dtype == torch.float16 else 1.0)
    x[count // 3] = 1e6 * x.abs().mean()
    return x.to(dtype)


def wide_ranging(count: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes spread evenly over twelve decades, or over ten for float16."""
    decades = torch.linspace(-6, 4 if dtype == torch.float16 else 6, count, dtype=torch.float64)
    shuffled = decades[torch.randperm(count, generator=torch.Generator().manual_seed(4))]
    return (normal(count, 3, torch.float64) * 10**shuffled).to(dtype)


def denormal(count: int, dtype: torch.dtype) -> Tensor:
    return (normal(count, 5, torch.float64) * (torch.finfo(dtype).tiny / 64)).to(dtype)


def huge(count: int, dtype: torch.dtype) -> Tensor:
    """As large as leaves room, in the working precision, for sums over elements in units of 2^-16."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    largest = min(torch.finfo(dtype).max, torch.finfo(working).max * 1e-10)
    x = normal(count, 6, torch.float64)
    return (x / x.abs().max() * largest).to(dtype)


INPUTS = [gaussian, constant, heavy_tailed, wide_ranging, huge, denormal]


def cases(dtypes: Iterable[torch.dtype]) -> list[tuple[Make, torch.dtype]]:
    """Every input in every dtype, but for denormal float64, which the contract counts as zero."""
    return [
        (make, dtype) for make in INPUTS for dtype in dtypes if (make, dtype) != (denormal, torch.float64)
    ]


@pytest.fixture(params=BASES)
def basis(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_close(got: Tensor, exact: Tensor, relative: float, absolute: float = 0.0) -> None:
    assert exact.isfinite().all()
    assert exact.abs().max() > 0
    error = torch.linalg.vector_norm(got.double() - exact).item()
    assert error <= relative * torch.linalg.vector_norm(exact).item() + absolute * math.sqrt(exact.numel())


@pytest.mark.parametrize(("make", "dtype"), cases(DTYPES))
def test_project_is_close_to_float64(make: Make, dtype: torch.dtype, basis: str) -> None:
    delta, offset = make(COUNT, dtype), 3 * 512 + 77
    gamma = ferret_ext.project(delta, SEED, K, basis=basis, offset=offset)
    exact = reference.project_float64(delta, SEED, K, basis=basis, offset=offset)
    assert_close(gamma, exact, PROJECT_BOUND[dtype], SMALLEST[gamma.dtype] / 2)


def test_project_counts_the_smallest_float64_as_zero(basis: str) -> None:
    """Below 2^-1000 a float64 tile keeps the scale of 2^-1000, that is multiples of 2^-1044."""
    delta = denormal(COUNT, torch.float64)
    gamma = ferret_ext.project(delta, SEED, K, basis=basis)
    exact = reference.project_float64(delta, SEED, K, basis=basis)
    largest_element = 6.56 if basis == "gaussian" else 1.0
    scale = math.sqrt(COUNT) / K / VARIANCE[basis]  # of a sum of elements times deltas
    assert exact.abs().max() > 0
    assert (gamma - exact).abs().max() <= COUNT * 2.0**-1045 * largest_element * scale


@pytest.mark.parametrize(("make", "dtype"), cases(RECONSTRUCT_BOUND))
@pytest.mark.parametrize("K", [1, 100, 4200])
def test_reconstruct_is_close_to_float64(make: Make, K: int, dtype: torch.dtype, basis: str) -> None:
    gamma = make(K, dtype)
    place = {"basis": basis, "offset": 640, "numel": 10**6}
    rebuilt = ferret_ext.reconstruct(gamma, SEED, 60, dtype=dtype, **place)
    exact = reference.reconstruct_float64(gamma, SEED, (60,), **place)
    assert_close(rebuilt, exact, RECONSTRUCT_BOUND[dtype], SMALLEST[dtype] / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstruct_inplace_rounds_once(dtype: torch.dtype, basis: str) -> None:
    """param + alpha V gamma is right to half a unit in its last place and what V gamma itself is off by."""
    param, gamma = normal(3000, 7, dtype), normal(100, 8)
    added = -0.3 * reference.reconstruct_float64(gamma, SEED, (3000,), basis=basis)
    exact = param.double() + added
    ferret_ext.reconstruct_(param, gamma, SEED, alpha=-0.3, basis=basis)
    half_unit = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((param.double() - exact).abs() <= half_unit * 1.001 + 5e-6 * added.norm() / math.sqrt(3000)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_basis_is_close_to_float64(dtype: torch.dtype, basis: str) -> None:
    v = ferret_ext.basis(SEED, 9, 3000, basis=basis, offset=99, numel=12345, dtype=dtype)
    one = torch.zeros(10, dtype=torch.float64)
    one[9] = 1
    exact = reference.reconstruct_float64(one, SEED, (3000,), basis=basis, offset=99, numel=12345)
    # half a unit in the last place, and a whole one for what float64 itself rounds on the way
    unit = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((v.double() - exact).abs() <= unit / 2 + torch.finfo(torch.float64).eps * exact.abs()).all()
