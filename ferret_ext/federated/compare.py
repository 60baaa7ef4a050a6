"""Several algorithms on one task: the same first model, data, order of data and evaluation for all of them.

Each run is a process of its own, one at a time, so that its peak memory is its own. Runs that are finished
stay; a comparison that was interrupted goes on in the middle of the run that it was at.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ferret_ext.federated import config as configuration
from ferret_ext.federated import page
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.journal import HEAD
from ferret_ext.federated.plot_comparison import save_comparison_plot
from ferret_ext.federated.settings import ConfigError, Setting, flatten, read_yaml

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Run:
    """One variant with one seed, and its folder."""

    variant: str
    seed: int
    config: SimulationConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def finished(self, overwrite: bool) -> bool:
        """Whether the folder holds the whole of this run.

        Raises ConfigError where it holds the whole of another one, unless that may be overwritten.
        """
        if not (self.folder / "run.json").exists():
            return False
        different = self._different()
        if different and not overwrite:
            key, saved, wanted = different[0]
            raise ConfigError(
                f"out: {self.folder} holds a finished run with {key} {saved!r}, expected {wanted!r}; choose "
                "another folder, or --overwrite"
            )
        return not different

    @property
    def begun(self) -> bool:
        """Whether the folder holds part of this run, which can be resumed."""
        return (self.folder / HEAD).exists() and not self._different()

    def _different(self) -> list[tuple[str, Any, Any]]:
        """The settings in which the folder's run differs: key, the folder's value, this run's."""
        saved, wanted = dict(read_yaml(self.folder / "config.yaml")), dict(flatten(asdict(self.config)))
        pairs = ((key, saved.get(key), _plain(value)) for key, value in wanted.items())
        return [
            (key, theirs, ours)
            for key, theirs, ours in pairs
            if theirs != ours and key.partition(".")[0] not in configuration.FREE_SETTINGS
        ]


def plan(
    settings_of: Callable[[str], Iterable[Setting]], variants: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Run]:
    """The runs, seed by seed, in folders of their own below `out`. Raises ConfigError."""
    runs = []
    for seed in seeds:
        for variant in variants:
            own = [("seed", seed), ("out", str(out / variant / f"seed-{seed}"))]
            runs.append(Run(variant, seed, configuration.build([*settings_of(variant), *own])))
    return runs


def _plain(value: Any) -> Any:
    """The value as YAML gives it back."""
    return list(value) if isinstance(value, tuple) else value


def carry_out(run: Run) -> str:
    """Simulates the run in a process of its own, whose lines go to our output; why it failed, else ""."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = run.folder.with_suffix(".yaml")
    run.config.save(wanted)
    ferret = [sys.executable, "-m", "ferret_ext.federated"]
    how = "--resume" if run.begun else "--overwrite"
    command = [*ferret, "simulate", "--config", str(wanted), how]
    # As ours does, the process imports what is installed, not a source tree that we may be in.
    status = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}).returncode
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    wanted.unlink()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + (
            ", perhaps for want of memory" if status == -signal.SIGKILL else ""
        )
    return "its error stands above" if status else ""


def read_run(run: Run) -> dict[str, Any]:
    """A finished run: its rounds, as in metrics.jsonl, and what run.json says of it."""
    rounds = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    about = json.loads((run.folder / "run.json").read_text("utf-8"))
    names = {key: Path(getattr(run.config, key)).name for key in ("model", "data")}  # not where they lie
    return {"variant": run.variant, "seed": run.seed, **names, **about, "rounds": rounds}


@dataclass(frozen=True)
class Row:
    """A variant over its seeds: means, and the least and largest final loss.

    Seconds and bytes are a client's of one round; those of the aggregation are the server's and a replica's
    rebuilding together. to_target: rounds until the evaluation loss is at most the target, None where a seed
    never gets there.
    """

    variant: str
    seeds: int
    loss: float
    lowest: float
    highest: float
    scores: dict[str, float]
    seconds_local: float
    seconds_project: float
    seconds_aggregate: float
    bytes_up: float
    bytes_down: float
    peak_memory_bytes: int
    to_target: float | None


def tabulate(runs: Sequence[dict[str, Any]], target: float) -> list[Row]:
    """A row a variant, in the order of the runs."""
    variants = dict.fromkeys(run["variant"] for run in runs)
    return [_row(variant, [run for run in runs if run["variant"] == variant], target) for variant in variants]


def default_target(runs: Sequence[dict[str, Any]]) -> float:
    """Half way, on a logarithmic scale of losses, from the first model's to the best final one."""
    first = fmean(run["rounds"][0]["eval_loss"] for run in runs)
    best = min(run["rounds"][-1]["eval_loss"] for run in runs)
    return math.sqrt(first * best)


def write(runs: Sequence[dict[str, Any]], rows: Sequence[Row], target: float, folder: Path) -> None:
    """comparison.json with every round, comparison.md with the table, the plots, and the page."""
    content = {"target_loss": target, "rows": [asdict(row) for row in rows], "runs": runs}
    (folder / COMPARISON).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / "comparison.md").write_text(markdown(rows, target), "utf-8")
    save_comparison_plot(runs, folder)
    page.write(folder)


def markdown(rows: Sequence[Row], target: float) -> str:
    """The rows as a table; what a column holds is said in `Row`."""
    head, *body = table(rows, target)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *body))


def table(rows: Sequence[Row], target: float) -> list[list[str]]:
    """Head and rows as text."""
    scores = list(rows[0].scores)
    seconds = [f"{part} s" for part in ("local", "project", "aggregate")]
    reach = f"rounds to {target:.2f}"
    head = ["variant", "loss", "spread", *scores, *seconds, "bytes up", "bytes down", "peak memory", reach]
    return [head, *(_cells(row, scores) for row in rows)]


def _cells(row: Row, scores: list[str]) -> list[str]:
    times = (row.seconds_local, row.seconds_project, row.seconds_aggregate)
    return [
        row.variant,
        f"{row.loss:.3f}",
        f"{row.lowest:.3f} .. {row.highest:.3f}" if row.seeds > 1 else "one seed",
        *(f"{row.scores[name]:.3f}" for name in scores),
        *(f"{seconds:.3g}" for seconds in times),
        f"{row.bytes_up:,.0f}",
        f"{row.bytes_down:,.0f}",
        f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
        "never" if row.to_target is None else f"{row.to_target:.3g}",
    ]


def _row(variant: str, runs: list[dict[str, Any]], target: float) -> Row:
    finals = [run["rounds"][-1]["eval_loss"] for run in runs]
    rounds = [round_ for run in runs for round_ in run["rounds"][1:]]
    turns = sum(len(round_["clients"]) for round_ in rounds)

    def a_turn(*names: str) -> float:
        return float(sum(round_[name] for round_ in rounds for name in names)) / turns

    reached = [_first_at(run["rounds"], target) for run in runs]
    scores = [run["rounds"][-1]["scores"] for run in runs]
    return Row(
        variant=variant,
        seeds=len(runs),
        loss=fmean(finals),
        lowest=min(finals),
        highest=max(finals),
        scores={name: fmean(of_run[name] for of_run in scores) for name in scores[0]},
        seconds_local=a_turn("seconds_local"),
        seconds_project=a_turn("seconds_project"),
        seconds_aggregate=sum(round_["seconds_rebuild"] + round_["seconds_server"] for round_ in rounds)
        / len(rounds),
        bytes_up=a_turn("payload_bytes_up"),
        bytes_down=a_turn("payload_bytes_down"),
        peak_memory_bytes=max(run["peak_memory_bytes"] for run in runs),
        to_target=None if None in reached else fmean(round_ for round_ in reached if round_ is not None),
    )


def _first_at(rounds: Sequence[dict[str, Any]], target: float) -> int | None:
    return next((round_["round"] for round_ in rounds if round_["eval_loss"] <= target), None)
