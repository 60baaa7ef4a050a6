"""An update as K numbers: project what training changed, send seed and numbers, rebuild it elsewhere."""

import torch
from torch import nn

import ferret_ext

SEED, K = 2024, 4096


def train(model: nn.Module, steps: int = 20) -> None:
    """Any first-order training; here a regression on random data."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randn(256, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.MSELoss()(model(x), y).backward()
        optimizer.step()


def main() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    plan = ferret_ext.BlockPlan.from_parameters(model.named_parameters(), K)
    old = [parameter.detach().clone() for parameter in model.parameters()]
    train(model)
    new = list(model.parameters())

    # The three lines: what a client sends is SEED and gammas, what everybody else does with them is apply_.
    gammas = ferret_ext.project_difference(plan, old, new, SEED)
    rebuilt = [parameter.clone() for parameter in old]
    ferret_ext.apply_(plan, rebuilt, [(SEED, gammas, 1.0)], alpha=-1.0)

    delta = torch.cat([(before - after).flatten() for before, after in zip(old, new, strict=True)]).detach()
    delta_rebuilt = torch.cat(
        [(before - after).flatten() for before, after in zip(old, rebuilt, strict=True)]
    )
    cosine = nn.functional.cosine_similarity(delta, delta_rebuilt, dim=0)
    print(f"{delta.numel():,} numbers sent as {gammas.numel():,}: cosine of the rebuilt update {cosine:.3f}")


if __name__ == "__main__":
    main()
