"""`ferret plot`: pictures of runs that are there: their loss, where their coordinates go, and their time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ferret_ext.federated import algorithms, journal, ledger, models, wire
from ferret_ext.federated.algorithms.ferret import Projecting
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig, build
from ferret_ext.federated.plot import LOSS, STYLE, WHOLE
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
    runs = [_read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = [{"variant": run.label, "rounds": run.rounds} for run in runs]
        save_comparison_plot(data, out, "loss")
        _save(out, "time", (9, 1.6 + 0.5 * len(runs)), lambda axes: _draw_time(axes, runs))
        names = ["loss", "time"]
        for index, run in enumerate(runs):
            if plans := plans_of(run):
                names.append("coordinates" if len(runs) == 1 else f"coordinates-{index + 1}")
                _save_coordinates(out, names[-1], run.label, plans)
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


def _read(folder: Path, label: str) -> Run:
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


def _save(folder: Path, name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _draw_time(axes: Axes, runs: Sequence[Run]) -> None:
    """A bar a run: seconds of a round on average, all clients together, by phase."""
    means = {
        phase: [fmean(row[f"seconds_{phase}"] for row in run.rounds[1:]) for run in runs] for phase in PHASES
    }
    names, starts = [run.label for run in runs], [0.0] * len(runs)
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


def _save_coordinates(folder: Path, name: str, label: str, plans: Sequence[BlockPlan]) -> None:
    count = len(plans[0].blocks)
    height = 1.6 + 0.22 * count if count <= MOST_NAMES else 6.0
    _save(folder, name, (9, height), lambda axes: _draw_coordinates(axes, label, plans))


def _draw_coordinates(axes: Axes, label: str, plans: Sequence[BlockPlan]) -> None:
    """K_l of each block in the last round, and in the first where they differ."""
    first, last = ([block.k for block in plans[index].blocks] for index in (0, -1))
    places = range(len(last))
    axes.barh(
        places, last, color=LOSS, height=0.7, label=f"round {len(plans)}" if first != last else "all rounds"
    )
    if first != last:
        axes.plot(
            first, places, "|", color=COLOURS[1], markersize=9, markeredgewidth=2.2, label="round 1, by size"
        )
        axes.legend(frameon=False, loc="lower right")
    if len(last) <= MOST_NAMES:
        axes.set_yticks(list(places), [block.name for block in plans[0].blocks], fontsize=8)
    else:
        axes.set(ylabel="block, in the model's order")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=WHOLE, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set(title=f"{label}: {plans[0].K:,} coordinates by block", xlabel="coordinates $K_l$")
