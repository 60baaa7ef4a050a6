"""`ferret plot`: pictures of runs that are there: loss, time, coordinates by block, and who holds what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ferret_ext.federated import plot_coordinates, plot_partition
from ferret_ext.federated.config import SimulationConfig, build
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.plot import LOSS, plain, save, single
from ferret_ext.federated.plot_comparison import COLOURS, save_comparison_plot
from ferret_ext.federated.plot_coordinates import NoCoordinates
from ferret_ext.federated.settings import ConfigError, read_yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("local", "project", "rebuild", "server", "eval", "generate")
PARTITION = "partition.json"


@dataclass(frozen=True)
class Run:
    """A run's folder, a label that no other run has, and the lines of its metrics."""

    folder: Path
    label: str
    config: SimulationConfig
    rounds: list[dict[str, Any]]


def save_plots(folders: Sequence[Path], out: Path) -> tuple[list[str], list[str]]:
    """Writes the pictures, each as .png and .svg: their names, and why others are missing.

    Raises ConfigError and LedgerError.
    """
    runs = [read_run(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    notes: list[str] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = [{"variant": run.label, "rounds": run.rounds} for run in runs]
        save_comparison_plot(data, out, "loss")
        save(single(draw_time, runs), (9, 1.6 + 0.5 * len(runs)), out, "time")
        names = ["loss", "time"]
        for index, run in enumerate(runs):
            number = "" if len(runs) == 1 else f"-{index + 1}"
            try:
                found = plot_coordinates.of_run(run.folder, run.config)
                names.append(f"coordinates{number}")
                plot_coordinates.save_coordinates_plot(found, run.label, out, names[-1])
            except NoCoordinates as reason:
                notes.append(f"{run.label}: no coordinates by block: {reason}")
            if holdings := read_holdings(run.folder):
                names.append(f"partition{number}")
                plot_partition.save_partition_plot(holdings, out, names[-1])
            else:
                notes.append(f"{run.label}: no picture of who holds what: there is no {PARTITION}")
    except OSError as error:
        raise ConfigError(f"out: expected a folder that can be written, got {str(out)!r}: {error}") from None
    return names, notes


def labels(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(folders):
            return short
    raise ConfigError("runs: expected each run once, got one twice")


def read_run(folder: Path, label: str) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"runs: expected a run's folder with metrics.jsonl, got {str(folder)!r}")
    try:
        rounds = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise ConfigError(f"runs: {path} is damaged: {error}") from None
    if len(rounds) < 2:
        raise ConfigError(f"runs: expected at least one finished round in {str(folder)!r}, got none")
    return Run(folder, label, build(read_yaml(folder / "config.yaml"), required=()), rounds)


def read_holdings(folder: Path) -> Holdings | None:
    """Who holds what in a run; None where its folder does not say. Raises ConfigError."""
    path = folder / PARTITION
    try:
        return Holdings.of_dict(json.loads(path.read_text("utf-8"))) if path.exists() else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"folder: {path} is damaged: {error}") from None


def draw_time(axes: Axes, runs: Sequence[Run]) -> None:
    """A bar a run: seconds of a round on average, all clients together, by phase."""
    means = {
        phase: [fmean(row[f"seconds_{phase}"] for row in run.rounds[1:]) for run in runs] for phase in PHASES
    }
    names, starts = [plain(run.label) for run in runs], [0.0] * len(runs)
    for (phase, widths), colour in zip(means.items(), COLOURS, strict=True):
        if max(widths) > 0:
            shown = f"{phase} {widths[0]:.3g} s" if len(runs) == 1 else phase
            axes.barh(names, widths, left=starts, color=colour, height=0.55, label=shown)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, total in enumerate(starts):
        axes.annotate(
            f"{total:.3g} s", (total, place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.set(title="Time of a round by phase", xlabel="seconds a round, all clients and the server")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_phases(axes: Axes, run: Run) -> None:
    """A bar a phase: seconds of a round on average, all clients together."""
    means = {phase: fmean(row[f"seconds_{phase}"] for row in run.rounds[1:]) for phase in PHASES}
    shown = {phase: mean for phase, mean in means.items() if mean > 0}
    drawn = axes.barh(list(shown), list(shown.values()), color=LOSS, height=0.6)
    axes.bar_label(drawn, [f"{mean:.3g} s" for mean in shown.values()], padding=5)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.set(title="Time of a round by phase", xlabel="seconds a round, all clients and the server")
