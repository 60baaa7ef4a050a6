"""What clients that lie do to a run, and what each rule of `robust.*` makes of it.

    python benchmarks/attacks.py [--rounds 8] [--clients 10] [--attackers 3] [--json FILE]

Some of ten clients train like the others and then send something else: their update with its sign turned, ten
times as long besides, a thousand times as long, or random numbers of the same norm. Told is the evaluation
loss of the demo's Llama of 0.1 million parameters after the last round, in nats, and how many updates were
rejected.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timer import write

from ferret_ext.federated import algorithms, models, presets, wire
from ferret_ext.federated import config as configuration
from ferret_ext.federated.algorithms.base import Algorithm, Reply
from ferret_ext.federated.client import DivergedError, LocalTrainer
from ferret_ext.federated.config import RobustConfig, SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation, Evaluator
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.rounds import Deaf, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server

NONE = "none"
MIDDLE = RobustConfig(trim=0.3)  # as many as attack at most
RULES = {
    "mean": MIDDLE,
    "mean, 5 x norm rejected": replace(MIDDLE, max_norm_ratio=5.0),
    "norm-clip": replace(MIDDLE, rule="norm-clip"),
    "median": replace(MIDDLE, rule="median"),
    "trimmed-mean": replace(MIDDLE, rule="trimmed-mean"),
}
VARIANTS = ("fedavg", "ferret", presets.SHARED_ROUND)
ROW = "{variant:20} {rule:24} {attack:10} {attackers:>9} {shown:>9} {rejected:>8}"
Array = wire.Array
Spoil = Callable[[Array, np.random.Generator], Array]


# ---- attacks ----


def random_like(update: Array, random: np.random.Generator) -> Array:
    """Gaussian numbers of the update's norm."""
    noise: Array = random.standard_normal(update.shape)
    noise *= np.linalg.norm(update) / np.linalg.norm(noise)
    return noise


ATTACKS: dict[str, Spoil] = {
    "sign flip": lambda update, random: -update,
    "x -10": lambda update, random: -10 * update,
    "x 1000": lambda update, random: 1000 * update,
    "random": random_like,
}


def spoil(payload: bytes, attack: str, seed: int) -> bytes:
    """The update after the attack on each of its arrays of floats. Header, seed and weight stay."""
    message, random = wire.decode(payload), np.random.default_rng(seed)
    values = {
        name: ATTACKS[attack](value.astype(np.float64), random).astype(value.dtype)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in message.values.items()
    }
    return wire.encode(replace(message, values=values))


# ---- runs ----


@dataclass(frozen=True)
class Task:
    """What is trained: an algorithm for a variant's name, the first model, data by client, and a loss."""

    algorithm: Callable[[str], Algorithm[Any]]
    model: Any
    shards: Sequence[Sequence[Example]]
    loss: Callable[[Any], float]

    @property
    def variants(self) -> dict[str, list[str]]:
        """The names of the rules that each variant knows."""
        return {
            name: [label for label, rule in RULES.items() if rule.rule in self.algorithm(name).rules]
            for name in VARIANTS
        }


@dataclass(frozen=True)
class Attackers:
    """Carries messages, and spoils those of the first `count` clients."""

    members: InProcessClients
    attack: str
    count: int

    def exchange(self, round_: int, chosen: list[int], server: Server[Any]) -> list[Reply]:
        replies = self.members.exchange(Deaf(), round_, chosen, server)
        return [self._carry(round_, reply) for reply in replies]

    def _carry(self, round_: int, reply: Reply) -> Reply:
        if self.attack == NONE or reply.client >= self.count or reply.failure:
            return reply
        seed = derive(0, "attack", round_, reply.client)
        return replace(reply, payload=spoil(reply.payload, self.attack, seed))


def run(task: Task, variant: str, rule: str, attack: str, attackers: int, rounds: int) -> tuple[float, int]:
    """The loss after the last round, inf where numbers are no longer finite, and how many were rejected."""
    algorithm, count = task.algorithm(variant), len(task.shards)
    members = InProcessClients(algorithm, copy.deepcopy(task.model), task.shards, [1.0] * count, seed=0)
    server = Server(algorithm, copy.deepcopy(task.model), range(count), 1.0, 0, robust=RULES[rule])
    carrier = Attackers(members, attack, attackers)
    evaluate = partial(_evaluate, task, rounds)
    try:
        history = run_rounds(rounds, server, carrier.exchange, evaluate, Deaf(), 1)
    except DivergedError:
        return math.inf, 0
    return history[-1].eval_loss, sum(len(metrics.rejected) for metrics in history)


def _evaluate(task: Task, rounds: int, round_: int, model: Any, watch: Stopwatch) -> Evaluation:
    """The loss after the last round; the ones before do not matter here."""
    return Evaluation(task.loss(model) if round_ == rounds else 0.0, 1, {}, [])


def rows_of(task: Task, attackers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Every variant under every rule, without attack and under each, with so many attackers."""
    rows = []
    for variant, rules in task.variants.items():
        for rule in rules:
            for attack, count in [(NONE, 0), *((attack, n) for n in attackers for attack in ATTACKS)]:
                loss, rejected = run(task, variant, rule, attack, count, rounds)
                row = {"variant": variant, "rule": rule, "attack": attack, "attackers": count}
                shown = f"{loss:.3f}" if loss < 1e4 else "diverges"
                print(ROW.format(**row, shown=shown, rejected=rejected), flush=True)
                rows.append({**row, "loss": loss if math.isfinite(loss) else None, "rejected": rejected})
    return rows


# ---- the demo's Llama ----


def demo(clients: int) -> Task:
    """The preset `demo`, with more clients that train less: two steps of Adam on two records each."""
    config = _config("ferret", clients)
    model, tokenizer = models.load(config.model, config.dtype, torch.device("cpu"), derive(0, "model"))
    data = loading.load(config, tokenizer, config.dataset.max_length, lambda line: None)
    evaluator = Evaluator(config.evaluation, data.held, tokenizer, {})

    def algorithm(variant: str) -> Algorithm[Any]:
        own = _config(variant, clients)
        return algorithms.create(own, LocalTrainer(own.training, tokenizer.pad_token_id))

    return Task(algorithm, model, data.shards, lambda model: evaluator.evaluate(model, Stopwatch()).loss)


def _config(variant: str, clients: int) -> SimulationConfig:
    own: dict[str, Any] = {
        "out": "-",
        "num_clients": clients,
        "server_learning_rate": 1.0 if variant == "fedavg" else 0.5,
        "training.max_steps": 2,
        "training.gradient_accumulation_steps": 1,
        "training.per_device_train_batch_size": 2,
        "dataset.max_length": 96,
        "evaluation.max_samples": 50,
    }
    return configuration.build([*presets.settings_of("demo", variant), *own.items()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--attackers", default="3", help="how many attack, e.g. 1,3")
    parser.add_argument("--json", type=Path, help="where results go too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attackers = [int(count) for count in options.attackers.split(",")]
    head = {name: name for name in ("variant", "rule", "attack", "attackers", "rejected")}
    print(ROW.format(**head, shown="loss"))
    rows = rows_of(demo(options.clients), attackers, options.rounds)
    if options.json is not None:
        write(options.json, rows, rounds=options.rounds, clients=options.clients)


if __name__ == "__main__":
    main()
