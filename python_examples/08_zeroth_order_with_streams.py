"""Train by losses alone along directions of the streams: no backward pass, and an update is one number.

    python python_examples/08_zeroth_order_with_streams.py

    slope = (loss(w + eps z) - loss(w - eps z)) / (2 eps),    w <- w - learning_rate * slope * z

z is regenerated from its seed wherever it is needed (MeZO, Malladi et al., arXiv 2305.17333). Each layer
computes with a perturbed copy of its own parameters, so the weights stay what the steps made of them, and
whoever knows the seeds and slopes gets the same weights, to the bit.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ferret_ext.federated.zeroth_order import Layerwise, StreamDirections

STEPS, EPS, LEARNING_RATE = 2000, 1e-3, 2e-3


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(512, 16)
    labels = teacher(4 * x).argmax(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    other = copy.deepcopy(model)  # somebody else's, who sees no data
    directions = StreamDirections.of(list(model.named_parameters()), "gaussian")
    perturbation = Layerwise(model, list(model.parameters()), directions)

    def loss() -> float:
        return cross_entropy(model(x), labels).item()

    print(f"loss before training: {loss():.3f}")
    slopes = []
    for seed in range(STEPS):
        plus, minus = perturbation.losses(loss, seed, EPS)
        slopes.append((plus - minus) / (2 * EPS))
        directions.add_(list(model.parameters()), [(seed, -LEARNING_RATE * slopes[-1])])
    print(f"after {STEPS:,} steps, no backward pass: {loss():.3f}")

    for seed, slope in enumerate(slopes):
        directions.add_(list(other.parameters()), [(seed, -LEARNING_RATE * slope)])
    same = all(map(torch.equal, model.parameters(), other.parameters()))
    print(f"rebuilt from {8 * STEPS:,} bytes of slopes: {'the same bits' if same else 'other weights'}")


if __name__ == "__main__":
    main()
