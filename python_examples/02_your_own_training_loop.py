"""Ferret in a training loop of your own: three lines, whatever the model, the data and the optimiser.

    python python_examples/02_your_own_training_loop.py

The loop is an ordinary one. After every round its update is replaced by what somebody else would rebuild from
a seed and K numbers. A single rebuilt update is noisy (see 01), so the step along it is K / (K + d), which
leaves the least error; with N clients that send updates of their own it could be N times as long.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ferret_ext

ROUNDS, STEPS, K = 40, 10, 1024


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """An untrained network, and points [1024, 32] with the classes that another network gives them."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(1024, 32)
    labels = teacher(4 * x).argmax(1)
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 4)), x, labels


def train(compressed: bool) -> list[float]:
    """The loss before the first round and after each."""
    model, x, labels = problem()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    plan = ferret_ext.BlockPlan.from_parameters(model.named_parameters(), K)
    step = K / (K + sum(param.numel() for param in params))
    losses = [cross_entropy(model(x), labels).item()]
    for round_ in range(ROUNDS):
        old = [param.detach().clone() for param in params]
        for batch in torch.randperm(len(x)).split(64)[:STEPS]:
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
        if compressed:  # the three lines of Ferret
            gammas = ferret_ext.project_difference(plan, old, params, seed=round_)
            ferret_ext.apply_(plan, old, [(round_, gammas, 1.0)], alpha=-step)
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(old), params)
        losses.append(cross_entropy(model(x), labels).item())
    return losses


def main() -> None:
    model = problem()[0]
    d = sum(param.numel() for param in model.parameters())
    whole, ferret = train(compressed=False), train(compressed=True)
    print(f"numbers a round: {d:,} whole, {K:,} by Ferret")
    for round_ in range(0, ROUNDS + 1, 10):
        print(f"round {round_:>2}: loss {whole[round_]:.3f} whole, {ferret[round_]:.3f} by Ferret")


if __name__ == "__main__":
    main()
