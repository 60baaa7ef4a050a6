"""A small regression whose examples are rows of one data set, for algorithms that look at losses alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ferret_ext
from ferret_ext.federated.data.tokens import Example
from ferret_ext.ops import Basis

ROWS = 12
EXAMPLES = [Example((row,), 0) for row in range(ROWS)]
RHO_D = {"rademacher": 1.0, "uniform": 21845 / 65536, "gaussian": 1.0}


def toy(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def table(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 9, generator=random, dtype=torch.float64)
    y = torch.randn(ROWS, 3, generator=random, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def loss(model: Any, batch: Sequence[Example]) -> float:
    rows = [example.input_ids[0] for example in batch]
    x, y = table(next(model.parameters()).dtype)
    with torch.no_grad():
        return (model(x[rows]) - y[rows]).double().square().mean().item()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def direction(seed: int, numel: int, basis: Basis) -> Tensor:
    """z, materialised: the basis column with its elements' variance rho = rho d / d brought to 1."""
    column = ferret_ext.basis(seed, 0, (numel,), basis=basis, dtype=torch.float64)
    return column * (numel / RHO_D[basis]) ** 0.5


def loss_at(w: Tensor) -> Callable[[Sequence[Example]], float]:
    """The toy's loss on a batch with other weights, given as one vector."""

    def evaluate(batch: Sequence[Example]) -> float:
        model = toy()
        nn.utils.vector_to_parameters(w, model.parameters())
        return loss(model, batch)

    return evaluate


def walk_by_the_book(
    w: Tensor,
    directions: Sequence[Sequence[Tensor]],
    batches: Sequence[Sequence[Example]],
    rate: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """T steps w -= rate mean_p(g_p z_p) with two-point slopes g; the last weights and the slopes [T, P]."""
    slopes = []
    for zs, batch in zip(directions, batches, strict=True):
        row = [(loss_at(w + eps * z)(batch) - loss_at(w - eps * z)(batch)) / (2 * eps) for z in zs]
        w = w - rate * sum(g * z for g, z in zip(row, zs, strict=True)) / len(zs)
        slopes.append(row)
    return w, torch.tensor(slopes, dtype=torch.float64)
