"""Federated rounds by hand, in 40 lines: clients with data of their own, and a server that sees coordinates.

    python python_examples/04_federated_rounds_by_hand.py

This is algorithm 1 of the paper (arXiv 2409.06277) without anything around it; `ferret simulate` is the same
on language models, with real messages, a ledger and a report. Each client holds two of eight classes, so that
none could learn the task alone.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ferret_ext

CLIENTS, ROUNDS, STEPS, K = 4, 30, 5, 1024


def main() -> None:
    torch.manual_seed(0)
    centres = torch.randn(2 * CLIENTS, 32)
    labels = torch.arange(2048) % len(centres)
    x = centres[labels] + 1.5 * torch.randn(len(labels), 32)
    held = [(labels[:1024] // 2 == client).nonzero().flatten() for client in range(CLIENTS)]

    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, len(centres)))
    params = list(model.parameters())
    weights = [param.detach().clone() for param in params]  # the global model
    plan = ferret_ext.BlockPlan.from_parameters(model.named_parameters(), K)
    d = sum(param.numel() for param in params)
    step = CLIENTS * K / (CLIENTS * K + d)  # leaves the least error, see example 02

    print(f"{CLIENTS} clients; each sends {4 * K + 8:,} bytes a round, its whole model would be {4 * d:,}")
    for round_ in range(ROUNDS + 1):
        if round_ % 10 == 0:
            load(params, weights)
            right = (model(x[1024:]).argmax(1) == labels[1024:]).float().mean()
            print(f"round {round_:>2}: {right:.1%} of the test points right")
        updates = []  # what crosses the network: (seed, coordinates, weight) of each client
        for client, own in enumerate(held):
            load(params, weights)
            train(model, x, labels, own)
            seed = CLIENTS * round_ + client
            gammas = ferret_ext.project_difference(plan, weights, params, seed)
            updates.append((seed, gammas, 1 / CLIENTS))
        ferret_ext.apply_(plan, weights, updates, alpha=-step)  # by the server, and by every client


def train(model: nn.Module, x: Tensor, labels: Tensor, own: Tensor) -> None:
    """A client's local training; any will do."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in own[torch.randperm(len(own))].split(32)[:STEPS]:
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def load(params: list[nn.Parameter], weights: list[Tensor]) -> None:
    for param, weight in zip(params, weights, strict=True):
        param.copy_(weight)


if __name__ == "__main__":
    main()
