"""What an update gives away, whole or as coordinates, with noise and without: members, and tokens.

    python benchmarks/privacy_attacks.py --model FOLDER --data FOLDER --json FILE [--clients 24]

The attacker knows the model that the client began with, the seed and what was sent, and has records of its
own of the same kind. GSM8K on the model as it is.

members: a client takes a step of SGD on each of 4 records. A record's score is the cosine of the update
with its gradient, both without their part along the attacker's mean gradient; from coordinates, the same of
coordinates. Told is the area under the ROC curve for the clients' records against as many others; for
single updates, and for the mean of all clients'.

tokens: a client takes one step on the first 40 tokens of a record. A token's score is (rows) the norm of
its row in the embedding's update, (matched) that row's part along the mean of the model's last hidden
states, with its sign, (span) the share of its normed embedding in the row space of the first layer's query,
key and value updates, of as many directions as there are tokens; of coordinates, that of the rebuilt
update. Told are the area under the ROC curve for the tokens that occur, and how many of the best-scored, as
many as occur, do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from timer import write
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan
from ferret_ext.federated import accounting, models
from ferret_ext.federated import config as configuration
from ferret_ext.federated.data import loading
from ferret_ext.federated.privacy import normal_of

RATE, RECORDS, LENGTH, DELTA = 0.1, 4, 40, 1e-5
SIZES = (None, 16384, 4096, 1024, 256, 64)  # coordinates; None: the whole update
NOISES = (0.0, 0.25, 1.0)  # local noise over the norm that is clipped to
DRAWS = 10  # of the noise, for members
Update = list[Tensor]


@dataclass(frozen=True)
class Victim:
    """The model that clients begin with, and records as token ids [1, n] of which none comes twice."""

    model: Any
    records: list[Tensor]

    @property
    def params(self) -> list[Tensor]:
        return [param for param in self.model.parameters() if param.requires_grad]

    def gradient(self, ids: Tensor) -> Update:
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return list(torch.autograd.grad(loss, self.params))

    def update(self, records: Sequence[Tensor]) -> Update:
        """What a step of SGD on each record changes; the model stays."""
        start = [param.detach().clone() for param in self.params]
        with torch.no_grad():
            for ids in records:
                with torch.enable_grad():
                    gradients = self.gradient(ids)
                for param, gradient in zip(self.params, gradients, strict=True):
                    param -= RATE * gradient
            update = [before - param for before, param in zip(start, self.params, strict=True)]
            for before, param in zip(start, self.params, strict=True):
                param.copy_(before)
        return update


def load(options: argparse.Namespace) -> Victim:
    settings = {"model": str(options.model), "data": str(options.data), "out": "-", "dataset.format": "gsm8k"}
    more = {"dataset.max_length": 200, "dataset.max_prompt_length": 150, "num_clients": 1, "seed": 1}
    config = configuration.build([*settings.items(), *more.items()])
    model, tokenizer = models.load(config.model, config.dtype, torch.device("cpu"), 0)
    shards = loading.load(config, tokenizer, 200, lambda line: None).shards
    return Victim(model.eval(), [torch.tensor([example.input_ids]) for example in shards[0]])


# ---- what is sent ----


@dataclass(frozen=True)
class Channel:
    """What a client sends: K coordinates, or all parameters, with noise where there is any.

    Both are vectors whose inner products are those of the updates, of coordinates in expectation.
    """

    plan: BlockPlan | None

    @classmethod
    def of(cls, model: Any, count: int | None) -> Channel:
        named = model.named_parameters()
        return cls(
            None if count is None else BlockPlan.from_parameters(named, K=count, allocation="sqrt-size")
        )

    def vector(self, update: Update, seed: int, noise: float = 0.0, draw: int = 0) -> Tensor:
        """noise: over the norm of what is sent, which it is clipped to."""
        if self.plan is None:
            return noisy(torch.cat([tensor.flatten() for tensor in update]), noise, seed, draw)
        zeros = [torch.zeros_like(tensor) for tensor in update]
        gammas = ferret_ext.project_difference(self.plan, update, zeros, seed)
        return noisy(gammas, noise, seed, draw) * self._scales(self.plan)

    def rebuilt(self, vector: Tensor, like: Update, seed: int) -> Update:
        if self.plan is None:
            parts = torch.split(vector, [tensor.numel() for tensor in like])
            return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
        update = [torch.zeros_like(tensor) for tensor in like]
        ferret_ext.apply_(self.plan, update, [(seed, vector / self._scales(self.plan), 1.0)], 1.0)
        return update

    @staticmethod
    def _scales(plan: BlockPlan) -> Tensor:
        """Beside which a coordinate's mean square is its share of the update's squared norm."""
        return torch.cat([torch.full((block.k,), (block.k / block.numel) ** 0.5) for block in plan.blocks])


def noisy(vector: Tensor, noise: float, seed: int, draw: int = 0) -> Tensor:
    """With this much noise over its norm in every number."""
    std = noise * vector.norm().item()
    random = normal_of(seed, round(1000 * noise), draw)
    return vector + std * torch.from_numpy(random(len(vector))).float() if noise else vector


def area(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Under the ROC curve: how often a positive's score is the higher one."""
    pairs = np.subtract.outer(np.array(positive), np.array(negative))
    return float((pairs > 0).mean() + (pairs == 0).mean() / 2)


# ---- members ----


def cosine(a: Tensor, b: Tensor, common: Tensor) -> float:
    """Of what is left of the two without their parts along a common direction."""
    direction = common / common.norm()
    a, b = (vector - torch.dot(vector, direction) * direction for vector in (a, b))
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def members(victim: Victim, clients: int) -> list[dict[str, Any]]:
    count = clients * RECORDS
    inside, outside, own = (victim.records[at : at + count] for at in (0, count, 2 * count))
    updates = [victim.update(inside[at : at + RECORDS]) for at in range(0, count, RECORDS)]
    gradients_in, gradients_out = ([victim.gradient(ids) for ids in part] for part in (inside, outside))
    common = mean([victim.gradient(ids) for ids in own[:64]])
    together = mean(updates)
    rows = []
    for size in SIZES:
        channel = Channel.of(victim.model, size)
        single: dict[float, tuple[list[float], list[float]]] = {noise: ([], []) for noise in NOISES}
        summed: tuple[list[float], list[float]] = ([], [])
        for client, update in enumerate(updates):
            seed, at = 1000 + client, slice(client * RECORDS, (client + 1) * RECORDS)
            shared = channel.vector(common, seed)
            sent = {
                noise: [channel.vector(update, seed, noise, draw) for draw in range(DRAWS if noise else 1)]
                for noise in NOISES
            }
            for side, part in enumerate((gradients_in[at], gradients_out[at])):
                guesses = [channel.vector(gradient, seed) for gradient in part]
                for noise, scores in single.items():
                    scores[side].extend(cosine(it, guess, shared) for it in sent[noise] for guess in guesses)
        summed_up, shared = channel.vector(together, 1), channel.vector(common, 1)
        for side, every in enumerate((gradients_in, gradients_out)):
            summed[side].extend(cosine(summed_up, channel.vector(guess, 1), shared) for guess in every)
        row = {"attack": "members", "K": size, **{f"noise {n:g}": area(*single[n]) for n in NOISES}}
        rows.append({**row, f"mean of {clients}": area(*summed)})
        print(rows[-1], flush=True)
    return rows


def mean(updates: Sequence[Update]) -> Update:
    return [torch.stack(tensors).mean(0) for tensors in zip(*updates, strict=True)]


# ---- tokens ----

Score = Callable[[Update], Tensor]  # update -> a score for each token


def scores_of(victim: Victim) -> dict[str, Score]:
    names = [name for name, param in victim.model.named_parameters() if param.requires_grad]
    embedding = names.index("model.embed_tokens.weight")
    inputs = [names.index(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    with torch.no_grad():
        hidden = [
            victim.model.model(input_ids=ids[:, :LENGTH]).last_hidden_state[0] for ids in victim.records[-32:]
        ]
        direction = torch.nn.functional.normalize(torch.cat(hidden).mean(0), dim=0)
        embedded = victim.model.model.layers[0].input_layernorm(victim.model.model.embed_tokens.weight)
        normed = torch.nn.functional.normalize(embedded, dim=1)

    def span(update: Update) -> Tensor:
        stacked = torch.cat([update[index] for index in inputs])
        rows = torch.linalg.svd(stacked, full_matrices=False).Vh[: LENGTH - 1]
        scores: Tensor = torch.linalg.vector_norm(normed @ rows.T, dim=1)
        return scores

    return {
        "rows": lambda update: update[embedding].norm(dim=1),
        "matched": lambda update: update[embedding] @ -direction,
        "span": span,
    }


def tokens(victim: Victim, clients: int) -> list[dict[str, Any]]:
    scores = scores_of(victim)
    records = [ids[:, :LENGTH] for ids in victim.records[:clients]]
    updates = [victim.update([ids]) for ids in records]
    rows = []
    for size in SIZES:
        channel = Channel.of(victim.model, size)
        for noise in NOISES:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in scores}
            for seed, (ids, update) in enumerate(zip(records, updates, strict=True)):
                rebuilt = channel.rebuilt(channel.vector(update, seed, noise), update, seed)
                for name, score in scores.items():
                    found[name].append(recovered(score(rebuilt), set(ids[0].tolist())))
            row: dict[str, Any] = {"attack": "tokens", "K": size, "noise": noise}
            for name, of in found.items():
                row[name] = {"area": fmean(a for a, _ in of), "found": fmean(b for _, b in of)}
            rows.append(row)
            print(row, flush=True)
    return rows


def recovered(scores: Tensor, present: set[int]) -> tuple[float, float]:
    """The area under the ROC curve, and the share of the best-scored tokens that occur."""
    here = [scores[token].item() for token in present]
    elsewhere = [score for token, score in enumerate(scores.tolist()) if token not in present]
    best = scores.topk(len(present)).indices.tolist()
    return area(here, elsewhere), len(present.intersection(best)) / len(present)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--json", type=Path, help="where results go too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    victim = load(options)
    rows = [*members(victim, options.clients), *tokens(victim, options.clients)]
    if options.json is not None:
        epsilons = {f"{noise:g}": accounting.epsilon(noise / 2, 1, DELTA) for noise in NOISES if noise}
        write(options.json, rows, clients=options.clients, epsilons=epsilons, delta=DELTA)


if __name__ == "__main__":
    main()
