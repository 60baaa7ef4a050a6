"""Loss at equal epsilon: Ferret with noise on K coordinates, beside FedAvg with noise on all d parameters.

    python benchmarks/privacy.py --model FOLDER --data FOLDER --json FILE [--seeds 0,1,2] [--epsilons 8,1]

GSM8K among 1,000 clients of 6 records each; a round draws each client by a secret coin of probability 0.04,
and a client makes one step on one record. All updates are clipped. Noise is central, at delta 1e-4 after all
rounds. The server's step is chosen for each algorithm and epsilon by the first seed, out of --steps; others
take it over. Runs that the file has are not run again. --plot draws the picture from the file.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timer import write

from ferret_ext.federated import accounting, algorithms, models, presets
from ferret_ext.federated import config as configuration
from ferret_ext.federated.client import DivergedError, LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.draws import SecretDraws
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation, Evaluator
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.plot import INK, STYLE
from ferret_ext.federated.plot_comparison import COLOURS
from ferret_ext.federated.rounds import Deaf, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server

IMAGES = Path(__file__).parents[1] / "docs" / "images"
DIVERGED = 1e9  # nats
CLIENTS, FRACTION, ROUNDS, DELTA = 1000, 0.04, 8, 1e-4
# Norms of updates to clip to, below nearly all that there are: parameters' and coordinates'.
CLIPS = {"fedavg": 1.0, "ferret": 8.0}
LABELS = {"fedavg": "DP-FedAvg, noise on 260,032 parameters", "ferret": "Ferret, noise on 4,096 coordinates"}


@dataclass(frozen=True)
class Task:
    """The first model, the clients' records and the loss, the same for all runs of a seed."""

    model: Any
    tokenizer: Any
    shards: Sequence[Sequence[Any]]
    evaluator: Evaluator


def config_of(options: argparse.Namespace, algorithm: str, seed: int) -> SimulationConfig:
    """Without noise yet."""
    variant = presets.SHARED_ROUND if algorithm == "ferret" else algorithm
    own: dict[str, Any] = {
        "model": str(options.model),
        "data": str(options.data),
        "out": "unused",
        "seed": seed,
        "num_clients": CLIENTS,
        "client_fraction": FRACTION,
        "rounds": ROUNDS,
        "training.max_steps": 1,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 0.1,
        "dataset.max_length": 224,
        "dataset.max_prompt_length": 176,
        "evaluation.max_samples": 100,
        "ferret.K": options.K,
        "ferret.coordinates": "float32",
        "ferret.allocation": "sqrt-size",
    }
    return configuration.build([*presets.settings_of("small/gsm8k", variant), *own.items()])


def private(config: SimulationConfig, epsilon: float | None) -> SimulationConfig:
    """The config with its noise. None: updates are clipped, and nothing is added."""
    clip = CLIPS[config.algorithm]
    privacy = configuration.PrivacyConfig(
        noise="central",
        clip_norm=clip,
        target_epsilon=epsilon,
        noise_multiplier=None if epsilon else 0.0,
        delta=DELTA,
        sampling="secret",
        noise_seed=config.seed,
    )
    return accounting.resolve(replace(config, privacy=privacy))


def prepare(options: argparse.Namespace, seed: int) -> Task:
    config = config_of(options, "fedavg", seed)
    model, tokenizer = models.load(config.model, config.dtype, torch.device("cpu"), derive(seed, "model"))
    data = loading.load(config, tokenizer, config.dataset.max_length, lambda line: None)
    return Task(model, tokenizer, data.shards, Evaluator(config.evaluation, data.held, tokenizer, {}))


def run(task: Task, config: SimulationConfig, step: float) -> float:
    """The evaluation loss after the last round; DIVERGED where numbers are no longer finite."""
    config = replace(config, server_learning_rate=step)
    algorithm = algorithms.create(config, LocalTrainer(config.training, task.tokenizer.pad_token_id))
    members = InProcessClients(
        algorithm, copy.deepcopy(task.model), task.shards, [1.0] * CLIENTS, config.seed
    )
    server = Server(
        algorithm,
        copy.deepcopy(task.model),
        range(CLIENTS),
        FRACTION,
        config.seed,
        verify_weights=False,
        privacy=config.privacy,
        draws=SecretDraws(range(CLIENTS), FRACTION, derive(config.seed, "benchmark")),
    )

    def evaluate(round_: int, model: Any, watch: Stopwatch) -> Evaluation:
        last = round_ == ROUNDS
        return task.evaluator.evaluate(model, watch) if last else Evaluation(0.0, 1, {}, [])

    try:
        return run_rounds(ROUNDS, server, partial(members.exchange, Deaf()), evaluate, Deaf(), 1)[
            -1
        ].eval_loss
    except DivergedError:
        return DIVERGED


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each algorithm and epsilon, with its runs by seed; those of the first seed by step too."""
    rows = json.loads(options.json.read_text("utf-8"))["rows"] if options.json.exists() else []
    found = {(row["algorithm"], row["epsilon"]): row for row in rows}
    for seed in options.seeds:
        task = None
        for epsilon, algorithm in product(options.epsilons, CLIPS):
            row = found.setdefault((algorithm, epsilon), {"algorithm": algorithm, "epsilon": epsilon})
            runs, tried = row.setdefault("runs", {}), row.setdefault("tried", {})
            if seed == options.seeds[0]:
                missing = [step for step in options.steps if f"{step:g}" not in tried]
            else:
                missing = [row["step"]] if str(seed) not in runs else []
            if not missing:
                continue
            task = task or prepare(options, seed)
            config = private(config_of(options, algorithm, seed), epsilon)
            row.update(K=options.K, noise_multiplier=config.privacy.noise_multiplier)
            losses = {f"{step:g}": run(task, config, step) for step in missing}
            if seed == options.seeds[0]:
                tried |= losses
                row["step"] = float(min(tried, key=tried.__getitem__))
                losses = tried
            runs[str(seed)] = losses[f"{row['step']:g}"]
            print(row, flush=True)
            write(options.json, list(found.values()), clients=CLIENTS, fraction=FRACTION, rounds=ROUNDS)
    return list(found.values())


# ---- picture ----


def save_plot(rows: Sequence[Mapping[str, Any]]) -> None:
    """privacy.svg and .png: the loss by epsilon, its mean and range over the seeds."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        epsilons = sorted({row["epsilon"] for row in rows if row["epsilon"]})
        places = {epsilon: place for place, epsilon in enumerate((*epsilons, None))}
        for (algorithm, label), colour, shift in zip(LABELS.items(), COLOURS, (-0.06, 0.06), strict=False):
            own = sorted((places[row["epsilon"]], row) for row in rows if row["algorithm"] == algorithm)
            losses = [list(row["runs"].values()) for _, row in own]
            means = [fmean(of) for of in losses]
            ends = [
                [mean - min(of) for mean, of in zip(means, losses, strict=True)],
                [max(of) - mean for mean, of in zip(means, losses, strict=True)],
            ]
            at = [place + shift for place, _ in own]
            axes.errorbar(at, means, ends, color=colour, marker="o", capsize=3, label=label)
        axes.set_xticks(range(len(places)), [*(f"{epsilon:g}" for epsilon in epsilons), "no noise"])
        axes.set(xlabel="epsilon at delta 1e-4", ylabel=f"evaluation loss after {ROUNDS} rounds, nats")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, labelcolor=INK)
        figure.savefig(IMAGES / "privacy.png", dpi=150)
        figure.savefig(IMAGES / "privacy.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epsilons", default="8,1,none")
    parser.add_argument("--steps", default="0.25,0.5,1.5", help="of the server, to choose from")
    parser.add_argument("--K", type=int, default=4096)
    parser.add_argument("--plot", action="store_true", help="draw the picture instead")
    options = parser.parse_args()
    if options.plot:
        save_plot(json.loads(options.json.read_text("utf-8"))["rows"])
        return
    if options.model is None or options.data is None:
        parser.error("expected --model and --data")
    torch.set_num_threads(1)
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.epsilons = [None if it == "none" else float(it) for it in options.epsilons.split(",")]
    options.steps = [float(step) for step in options.steps.split(",")]
    rows_of(options)


if __name__ == "__main__":
    main()
