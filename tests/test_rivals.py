"""The rivals of the benchmark do what project does: V gamma estimates delta without bias, V being theirs."""

import math

import pytest
import torch
from rivals import TORCH_CHUNK, scikit_learn, scikit_learn_fit, scikit_learn_transform
from rivals import rivals as all_rivals
from support import normal
from torch import Tensor

D, K, CHUNK = 203, 32, 50  # the last of the chunks of delta is a short one
PLACES = [0, 1, 49, 50, 149, 150, 202]  # both ends of chunks
RHO = {"authors' loop": 1 / (3 * D)}  # an element's variance; 1 / D for all others
SIGNED = ["numpy unpackbits", "numpy table", "torch bernoulli"]
Z = 5.5  # standard errors, as in test_statistics.py

every_rival = pytest.mark.parametrize("name", all_rivals())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, restored_threads: None) -> None:
    monkeypatch.setattr("rivals.NUMPY_CHUNK", CHUNK * K)
    monkeypatch.setitem(TORCH_CHUNK, "cpu", CHUNK * K)
    torch.set_num_threads(1)


def unit_gammas(name: str, seed: int) -> Tensor:
    """The coordinates of the unit vectors at PLACES, which are rows of V over rho K: float64 [places, K]."""
    units = torch.zeros(len(PLACES), D)
    units[range(len(PLACES)), PLACES] = 1
    return torch.stack([all_rivals()[name](unit, seed, K) for unit in units]).double()


@every_rival
def test_rival_is_linear(name: str) -> None:
    weights = normal(len(PLACES), 1)
    delta = torch.zeros(D).index_copy(0, torch.tensor(PLACES), weights)
    gamma = all_rivals()[name](delta, 3, K)
    assert gamma.shape == (K,)
    torch.testing.assert_close(
        gamma.double(), weights.double() @ unit_gammas(name, 3), rtol=1e-5, atol=1e-5 * gamma.norm().item()
    )


@every_rival
def test_rival_is_unbiased(name: str) -> None:
    """E[V gamma] = delta for every unit vector, over 40 seeds: E[rho K G G^T] = 1 with V = rho K G^T. What is
    off the diagonal has the variance 1/K that K independent columns give.

    The seeds lie K apart, because the authors' vectors of seed s are those with the numbers s to s + K - 1.
    """
    gammas = torch.stack([unit_gammas(name, seed * K) for seed in range(40)])
    estimates = RHO.get(name, 1 / D) * K * gammas @ gammas.mT
    margin = Z * estimates.std(0) / math.sqrt(len(estimates)) + 1e-5
    assert margin.max() < 0.3
    assert ((estimates.mean(0) - torch.eye(len(PLACES))).abs() <= margin).all()
    row, column = torch.triu_indices(len(PLACES), len(PLACES), 1)
    noise = K * estimates[:, row, column].square()
    assert noise.mean().item() == pytest.approx(1, abs=Z * noise.std().item() / math.sqrt(noise.numel()))


@pytest.mark.parametrize("name", SIGNED)
def test_rival_has_a_basis_of_signs(name: str) -> None:
    elements = unit_gammas(name, 5) * (K / math.sqrt(D))
    torch.testing.assert_close(elements.abs(), torch.ones_like(elements), rtol=1e-5, atol=0)


def test_numpy_rivals_agree() -> None:
    """Two ways of using the same bits."""
    delta = normal(D + 3, 2)
    unpacked, looked_up = (all_rivals()[name](delta, 7, 5) for name in ("numpy unpackbits", "numpy table"))
    torch.testing.assert_close(unpacked, looked_up, rtol=0, atol=1e-4 * unpacked.norm().item())


def test_scikit_learn_transform_is_what_follows_its_fit() -> None:
    pytest.importorskip("sklearn")
    delta = normal(D)
    gamma = scikit_learn_transform(delta, scikit_learn_fit(delta, 1, K))
    torch.testing.assert_close(gamma, scikit_learn(delta, 1, K))
