"""What a round is made of: the server's optimiser, the local one, steps, bases, clients, sampling.

    python benchmarks/rounds_study.py --model FOLDER --data gsm8k=FOLDER --data languages=FOLDER \\
        --data dolly=FILE --json FILE

Every case is a run of the preset small/gsm8k, or small/dolly, with a few settings changed, by seed; runs that
the file has are not run again. languages: a folder of `languages.py`. --only TEXT: cases whose task, study
and name begin so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from quality import Quiet
from timer import write

from ferret_ext.federated import config as configuration
from ferret_ext.federated import presets
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.engines.in_process import simulate

Settings = dict[str, Any]

# Less local work than the presets', so that there can be many runs: a step is one or two records.
TASKS: dict[str, Settings] = {
    "gsm8k": {"training.gradient_accumulation_steps": 1, "evaluation.max_samples": 50},
    "languages": {
        "training.gradient_accumulation_steps": 2,
        "num_clients": None,
        "client_fraction": 3 / 8,
        "partition.kind": "natural-id",
        "partition.column": "language",
        "dataset.format": "auto",
        "dataset.prompt": "{language}: {input} = ",
        "dataset.response": "{output}",
    },
    "dolly": {"training.gradient_accumulation_steps": 1, "evaluation.max_samples": 50},
}
PRESETS = {"dolly": "small/dolly"}  # of the others small/gsm8k
# 512 bytes a client and round, of a model of 47 tensors, as `quality.FORMS` has them
PLAIN: Settings = {
    "ferret.K": 406,
    "ferret.granularity": "tensor",
    "ferret.coordinates": "choice8",
    "ferret.allocation": "curvature",
}
BEST = {**PLAIN, "server_learning_rate": 0.8, "ferret.server_warmup": 3}
LEVELS = {**BEST, "ferret.K": 457, "ferret.coordinates": "int8"}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """Runs of a task by an algorithm with settings of its own, one a seed. A trial chooses a rate by one."""

    study: str
    name: str
    task: str
    variant: str
    settings: Settings = field(default_factory=dict)
    trial: bool = False

    @property
    def seeds(self) -> Sequence[int]:
        return SEEDS[:1] if self.trial else SEEDS


def server_optimiser(task: str) -> Iterator[Case]:
    """Momentum and adaptive steps on the server, on what Ferret rebuilds and on what FedAvg averages."""
    yield Case("server", "ferret", task, "ferret", BEST)
    yield Case("server", "fedavg", task, "fedavg")
    for momentum, rate in ((0.5, 0.4), (0.9, 0.1)):
        given = {"server.momentum": momentum, "server_learning_rate": rate}
        yield Case("server", f"ferret momentum {momentum:g}", task, "ferret", {**BEST, **given})
    given = {"server.momentum": 0.5, "server_learning_rate": 0.5}
    yield Case("server", "fedavg momentum 0.5", task, "fedavg", given)


def adaptive(task: str) -> Iterator[Case]:
    """Steps for each weight by its own moments; Adam's best rate is Yogi's and Adagrad's too."""
    for optim, rate in (("adam", 3e-3), ("adam", 1e-2), ("adam", 3e-2), ("yogi", 3e-2), ("adagrad", 3e-2)):
        given = {**BEST, "server.optim": optim, "server_learning_rate": rate}
        yield Case("adaptive", f"ferret {optim} {rate:g}", task, "ferret", given, trial=rate != 3e-2)


def local_optimiser(task: str) -> Iterator[Case]:
    """The paper's first open question: AdamW in place of SGD."""
    for rate in (3e-4, 1e-3, 3e-3):
        adamw = {"training.optim": "adamw", "training.learning_rate": rate}
        yield Case("local", f"ferret adamw {rate:g}", task, "ferret", {**BEST, **adamw}, rate != 1e-3)
        if rate == 1e-3:
            yield Case("local", f"fedavg adamw {rate:g}", task, "fedavg", adamw)


def steps(task: str) -> Iterator[Case]:
    """Local steps a round, 100 in all, without a warm-up, which two rounds have no time for."""
    for count in (5, 10, 20, 50):
        given = {**PLAIN, "server_learning_rate": 0.6, "training.max_steps": count, "rounds": 100 // count}
        yield Case("steps", f"T = {count}", task, "ferret", given)


def clients(task: str) -> Iterator[Case]:
    """How many clients a round has, each with 512 bytes; three are the server study's."""
    for count in (1, 8):
        yield Case("clients", f"N = {count}", task, "ferret", {**BEST, "client_fraction": count / 8})


def bases(task: str) -> Iterator[Case]:
    """A basis for each client, or one for all of a round, by coordinates that can be averaged."""
    for seeds, rates in (("per-client", (0.2, 0.4, 0.8)), ("shared-round", (0.1, 0.2, 0.4))):
        for rate in rates:
            given = {**LEVELS, "ferret.seeds": seeds, "server_learning_rate": rate}
            yield Case("bases", f"{seeds} {rate:g}", task, "ferret", given, trial=rate != 0.4)


def sampling(task: str) -> Iterator[Case]:
    """Two of 40 clients a round, 5 %, whose data is skewed by language or, of Dolly, by category."""
    skewed = {"partition.kind": "dirichlet", "num_clients": 40, "client_fraction": 0.05}
    yield Case("sampling", "ferret", task, "ferret", {**BEST, **skewed})
    yield Case("sampling", "fedavg", task, "fedavg", skewed)
    momentum = {"server.momentum": 0.5, "server_learning_rate": 0.4}
    yield Case("sampling", "ferret momentum 0.5", task, "ferret", {**BEST, **skewed, **momentum})


STUDIES = (server_optimiser, adaptive, local_optimiser, bases, steps, clients, sampling)
CASES = [
    *server_optimiser("gsm8k"),
    *(case for study in STUDIES for case in study("languages")),
    *sampling("dolly"),
]


def run(options: argparse.Namespace, case: Case, seed: int) -> dict[str, Any]:
    """One run: by round its losses, and a client's bytes and seconds."""
    history = simulate(config_of(options, case, seed), Quiet()).history
    rounds = history[1:]
    return {
        "losses": [metrics.eval_loss for metrics in history],
        "bytes_up": fmean(metrics.payload_bytes_up / len(metrics.clients) for metrics in rounds),
        "bytes_down": fmean(metrics.payload_bytes_down / len(metrics.clients) for metrics in rounds),
        "seconds": {
            phase: fmean(getattr(metrics, f"seconds_{phase}") / len(metrics.clients) for metrics in rounds)
            for phase in ("local", "project", "rebuild")
        },
        "seconds_server": fmean(metrics.seconds_server for metrics in rounds),
    }


def config_of(options: argparse.Namespace, case: Case, seed: int) -> SimulationConfig:
    where = [
        ("model", str(options.model)),
        ("data", options.data[case.task]),
        ("out", "unused"),
        ("seed", seed),
    ]
    variant = presets.settings_of(PRESETS.get(case.task, "small/gsm8k"), case.variant)
    return configuration.build([*variant, *where, *TASKS[case.task].items(), *case.settings.items()])


def rows_of(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The file's rows by task, study and name; none where there is no file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {(row["task"], row["study"], row["name"]): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True, metavar="TASK=PATH")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=SEEDS)
    options = parser.parse_args()
    options.data = dict(given.split("=", 1) for given in options.data)
    torch.set_num_threads(1)
    found = rows_of(options.json)
    named = [case for case in CASES if f"{case.task} {case.study} {case.name}".startswith(options.only)]
    chosen = [case for case in named if case.task in options.data]
    for (
        seed
    ) in options.seeds:  # all cases by the first seed, then by the next, so that a part compares fairly
        for case in (case for case in chosen if seed in case.seeds):
            key = (case.task, case.study, case.name)
            row = found.setdefault(key, {"runs": {}})
            row.update(asdict(case))
            if str(seed) in row["runs"]:
                continue
            row["runs"][str(seed)] = told = run(options, case, seed)
            write(options.json, list(found.values()))
            print(
                f"{case.task:9} {case.study:8} {case.name:24} seed {seed}  loss {told['losses'][-1]:.4f}  "
                f"{told['bytes_up']:,.0f} up  local {told['seconds']['local']:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
