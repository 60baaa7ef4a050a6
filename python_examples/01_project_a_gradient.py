"""Project a gradient: any vector as K numbers and a seed, and what comes back on the other side.

    python python_examples/01_project_a_gradient.py

A rebuilt gradient points in the gradient's direction up to noise that is known beforehand: the cosine between
the two is sqrt(K / (K + d)). It has no bias, so the noise averages out over seeds.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

import ferret_ext

SEEDS = 64


def gradient() -> Tensor:
    """The gradient of a small network's loss as one vector [d]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x, labels = torch.randn(256, 64), torch.randint(10, (256,))
    return nn.utils.parameters_to_vector(
        torch.autograd.grad(cross_entropy(model(x), labels), list(model.parameters()))
    )


def main() -> None:
    g = gradient()
    d = g.numel()
    print(f"a gradient of {d:,} numbers, {4 * d:,} bytes")
    for K in (256, 1024, 4096):
        gamma = ferret_ext.project(g, seed=7, K=K)  # [K]: this and the seed are sent
        rebuilt = ferret_ext.reconstruct(gamma, 7, g.shape)  # the same bits on every CPU and GPU
        cosine = cosine_similarity(g, rebuilt, dim=0)
        print(f"K = {K:>5,}: {4 * K:>6,} bytes, cosine {cosine:.3f}, expected {math.sqrt(K / (K + d)):.3f}")

    mean = torch.zeros_like(g)
    for seed in range(SEEDS):
        gamma = ferret_ext.project(g, seed, K)
        ferret_ext.reconstruct_(mean, gamma, seed, alpha=1 / SEEDS)
    expected = math.sqrt(SEEDS * K / (SEEDS * K + d))
    cosine = cosine_similarity(g, mean, dim=0)
    print(f"mean over {SEEDS} seeds, K = {K:,}: cosine {cosine:.3f}, expected {expected:.3f}")


if __name__ == "__main__":
    main()
