"""The estimator's moments and the elements' distribution.

Averages over N independent seeds are compared with the exact expectation within Z standard errors, estimated
from the same N samples. By the central limit theorem a right implementation exceeds Z = 5.5 once in 26
million comparisons; seeds are fixed, so a test passes always or never. Every test also asks that its margin
be small enough to notice an error.
"""

import math

import pytest
import torch
from support import BASES, KURTOSIS, VARIANCE, normal
from torch import Tensor

import ferret_ext

Z = 5.5


@pytest.fixture(params=BASES)
def basis(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rebuilt_updates(delta: Tensor, K: int, count: int, basis: str) -> Tensor:
    """delta~ for seeds 0 to count - 1: float64 [count, d]."""
    return torch.stack(
        [
            ferret_ext.reconstruct(
                ferret_ext.project(delta, seed, K, basis=basis),
                seed,
                delta.shape,
                basis=basis,
                dtype=torch.float64,
            )
            for seed in range(count)
        ]
    )


def mean_and_margin(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(0), Z * samples.std(0) / math.sqrt(len(samples))


def test_reconstruct_of_project_is_unbiased(basis: str) -> None:
    """E[delta~] = delta (theorem 1), for each of the elements, which differ in size."""
    delta = normal(24) * torch.linspace(0.1, 3, 24)
    mean, margin = mean_and_margin(rebuilt_updates(delta, 16, 8000, basis))
    assert margin.max() < 0.1 * delta.norm()
    assert ((mean - delta).abs() <= margin).all()


@pytest.mark.parametrize(("d", "K"), [(3, 2), (40, 7), (700, 100)])
def test_reconstruct_of_project_has_the_variance_of_the_closed_form(d: int, K: int, basis: str) -> None:
    """E||delta~||^2 = ||delta||^2 (1 + (d - 1 + kurtosis - 1) / K)."""
    delta = normal(d, 1)
    squares = rebuilt_updates(delta, K, 120000 // d if d > 3 else 12000, basis).square().sum(1)
    mean, margin = mean_and_margin(squares / delta.double().square().sum())
    expected = 1 + (d - 1 + KURTOSIS[basis] - 1) / K
    assert margin < 0.12 * expected
    assert (mean - expected).abs() <= margin


def test_reconstruct_of_project_points_along_delta(basis: str) -> None:
    """E<delta~, delta> = ||delta||^2, which a wrong scale would change."""
    delta = normal(3000, 2)
    products = rebuilt_updates(delta, 400, 200, basis) @ delta.double()
    mean, margin = mean_and_margin(products / delta.double().square().sum())
    assert margin < 0.1
    assert (mean - 1).abs() <= margin


def test_project_of_a_column_is_its_norm_scaled(basis: str) -> None:
    """gamma_k = ||v_k||^2 / (rho K) for delta = v_k."""
    v = ferret_ext.basis(5, 2, 4000, basis=basis, dtype=torch.float64)
    gamma = ferret_ext.project(v, 5, 8, basis=basis)
    rho = VARIANCE[basis] / 4000
    assert gamma[2].item() == pytest.approx(v.square().sum().item() / (rho * 8), rel=1e-11)


@pytest.mark.parametrize("K", [1, 100])
def test_project_and_reconstruct_are_adjoint(K: int, basis: str) -> None:
    """<x, V g> = rho K <project(x), g>, within what the contract lets each side be off by."""
    x, g = normal(5000, 3), normal(K, 4)
    place = {"basis": basis, "offset": 1234, "numel": 9000}
    rebuilt = ferret_ext.reconstruct(g, 6, x.shape, **place).double()
    gamma = ferret_ext.project(x, 6, K, **place).double()
    scale = VARIANCE[basis] / 9000 * K
    bound = 1e-6 * x.norm() * rebuilt.norm() + scale * 1e-5 * gamma.norm() * g.norm()
    assert (x.double() @ rebuilt - scale * (gamma @ g.double())).abs() <= bound


def column(basis: str, seed: int, k: int, offset: int = 0) -> Tensor:
    """2^17 elements before the scale 1/sqrt(d): float64."""
    v = ferret_ext.basis(seed, k, 2**17, basis=basis, offset=offset, dtype=torch.float64)
    return v * math.sqrt(2**17)


def elements(basis: str) -> Tensor:
    """2^20 elements, from four columns and two far-apart places."""
    return torch.cat([column(basis, 9, k, offset) for k in (0, 1, 2**31, 2**32 - 1) for offset in (0, 2**45)])


def test_basis_elements_have_the_moments_of_their_kind(basis: str) -> None:
    b = elements(basis)
    for power, expected in (
        (1, 0.0),
        (2, VARIANCE[basis]),
        (3, 0.0),
        (4, KURTOSIS[basis] * VARIANCE[basis] ** 2),
    ):
        mean, margin = mean_and_margin(b**power)
        assert margin < 0.1
        assert (mean - expected).abs() <= margin + 1e-12


def test_basis_neighbours_are_uncorrelated(basis: str) -> None:
    """Products of elements up to 512 apart, of neighbouring columns and of neighbouring seeds, average 0."""
    b = elements(basis)
    first = column(basis, 9, 0)
    products = [b[:-lag] * b[lag:] for lag in (1, 2, 3, 4, 16, 32, 128, 512)]
    for samples in (*products, first * column(basis, 9, 1), first * column(basis, 10, 0)):
        mean, margin = mean_and_margin(samples)
        assert margin < 0.02
        assert mean.abs() <= margin


def test_basis_gaussian_elements_are_normal() -> None:
    """The empirical distribution of n samples is farther than e from the true one with probability at most
    2 exp(-2 n e^2) (Dvoretzky, Kiefer, Wolfowitz, Massart); e is chosen for one in a billion."""
    b = elements("gaussian").sort().values
    n = len(b)
    margin = math.sqrt(math.log(2e9) / (2 * n))
    exact = torch.special.ndtr(b)
    empirical = torch.arange(1, n + 1, dtype=torch.float64) / n
    rounding = 2**-16 * 0.4  # elements are multiples of 2^-16, the density is at most 0.4
    assert margin < 0.004
    assert (
        torch.maximum((empirical - exact).abs(), (empirical - 1 / n - exact).abs()).max() <= margin + rounding
    )


def test_basis_uniform_elements_take_each_of_256_levels_equally_often() -> None:
    levels = (elements("uniform") * 256 + 255) / 2
    counts = torch.bincount(levels.round().long(), minlength=256).double()
    expected = counts.sum() / 256
    assert len(counts) == 256
    assert ((counts - expected).abs() <= Z * expected.sqrt()).all()
