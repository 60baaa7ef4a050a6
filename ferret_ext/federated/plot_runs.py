"""`ferret plot`: pictures of runs that are there: their loss, where their coordinates go, and their time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ferret_ext.federated import algorithms, journal, ledger, models, wire
from ferret_ext.federated.algorithms.ferret import Projecting
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig, build
from ferret_ext.federated.plot import LOSS, WHOLE, plain, save, single
from ferret_ext.federated.plot_comparison import COLOURS, save_comparison_plot
from ferret_ext.federated.settings import ConfigError, read_yaml
from ferret_ext.plan import BlockPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("local", "project", "rebuild", "server", "eval", "generate")
MOST_NAMES = 40  # blocks that a picture has room to name


@dataclass(frozen=True)
class Run:
    """A run's folder, a label that no other run has, and the lines of its metrics."""

    folder: Path
    label: str
    config: SimulationConfig
    rounds: list[dict[str, Any]]


def save_plots(folders: Sequence[Path], out: Path) -> list[str]:
    """Writes the pictures, each as .png and .svg; their names. Raises ConfigError, LedgerError."""
    runs = [read_run(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = [{"variant": run.label, "rounds": run.rounds} for run in runs]
        save_comparison_plot(data, out, "loss")
        save(single(draw_time, runs), (9, 1.6 + 0.5 * len(runs)), out, "time")
        names = ["loss", "time"]
        for index, run in enumerate(runs):
            if plans := plans_of(run):
                names.append("coordinates" if len(runs) == 1 else f"coordinates-{index + 1}")
                size = (9, coordinates_height(plans))
                save(single(draw_coordinates, plans, run.label), size, out, names[-1])
    except OSError as error:
        raise ConfigError(f"out: expected a folder that can be written, got {str(out)!r}: {error}") from None
    return names


def labels(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(folders):
            return short
    raise ConfigError("runs: expected each run once, got one twice")


def plans_of(run: Run) -> list[BlockPlan]:
    """The plans of rounds 1, 2, ..; none for algorithms without, or where the model is not at hand.

    K_l of an allocation by norm follow from the coordinates in the ledger.
    """
    path = run.folder / journal.LEDGER
    if run.config.algorithm != "ferret" or run.config.ferret.mode != "paper" or not path.exists():
        return []
    stored = run.folder / "model"
    try:
        model = models.skeleton(str(stored) if stored.is_dir() else run.config.model, run.config.dtype)
    except ConfigError:
        return []
    algorithm = algorithms.create(run.config, LocalTrainer(run.config.training, 0))
    assert isinstance(algorithm, Projecting)
    replica = algorithm.replicate(model)
    plans: list[BlockPlan] = []
    for record in ledger.read(path):
        if record.round > 0:
            algorithm.allocate(replica, wire.decode(record.value("broadcast", bytes)))
        if record.digest != replica.digest:
            return []  # another model
        plans.append(replica.plan)
    return plans[:-1]  # the last is of a round to come


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


def coordinates_height(plans: Sequence[BlockPlan]) -> float:
    """Inches that the picture needs."""
    count = len(plans[0].blocks)
    return 1.6 + 0.22 * count if count <= MOST_NAMES else 6.0


def draw_coordinates(axes: Axes, plans: Sequence[BlockPlan], label: str, longest: int = 80) -> None:
    """K_l of each block in the last round, and in the first where they differ.

    longest: characters of a block's name; of longer ones the end is shown.
    """
    first, last = ([block.k for block in plans[index].blocks] for index in (0, -1))
    places = range(len(last))
    axes.barh(
        places, last, color=LOSS, height=0.7, label=f"round {len(plans)}" if first != last else "all rounds"
    )
    if first != last:
        axes.plot(
            first,
            places,
            "|",
            color=COLOURS[1],
            markersize=9,
            markeredgewidth=2.2,
            label="round 1, by sqrt-size",
        )
        axes.legend(frameon=False, loc="lower right")
    if len(last) <= MOST_NAMES:
        names = [block.name for block in plans[0].blocks]
        shown = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
        axes.set_yticks(list(places), shown, fontsize=8)
    else:
        axes.set(ylabel="block, in the model's order")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=WHOLE, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    of_run = f"{plain(label)}: " if label else ""
    axes.set(title=f"{of_run}{plans[0].K:,} coordinates by block", xlabel="coordinates $K_l$")
