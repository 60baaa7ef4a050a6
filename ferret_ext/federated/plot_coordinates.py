"""The picture of a run's coordinates by block, as they follow from its ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ferret_ext.federated import adapters, algorithms, journal, ledger, models, wire
from ferret_ext.federated.algorithms.ferret import BY_NORM, Projecting
from ferret_ext.federated.algorithms.ferret_reference import FerretReference
from ferret_ext.federated.algorithms.plans import PlanReplica
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.plot import LOSS, WHOLE, plain, save, single
from ferret_ext.federated.plot_comparison import COLOURS
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 40  # blocks that a picture has room to name


class NoCoordinates(Exception):
    """Why a run has no such picture."""


@dataclass(frozen=True)
class Coordinates:
    """K_l of each block in rounds 1, 2, ..: counts [R][L], R >= 1.

    title, axis: of the picture. first: how the first round came to its own.
    """

    blocks: list[str]
    counts: list[list[int]]
    title: str
    axis: str = "coordinates $K_l$"
    first: str = "round 1"


def of_run(folder: Path, config: SimulationConfig) -> Coordinates:
    """What a run's ledger tells, of a run under way as far as it is. Raises NoCoordinates and LedgerError.

    K_l of an allocation by norm follow from the coordinates that were relayed. In the reference code's pool
    a block has K_l = K; there the picture is of the seeds that some client has taken for it.
    """
    if config.algorithm != "ferret":
        raise NoCoordinates(f"{config.algorithm} has none")
    path = folder / journal.LEDGER
    if not path.exists():
        raise NoCoordinates("there is no ledger")
    config = adapters.resolve(config)
    algorithm = algorithms.create(config, LocalTrainer(config.training, 0))
    replica: PlanReplica = algorithm.replicate(_skeleton(folder, config))
    blocks, counts = [block.name for block in replica.plan.blocks], []
    for record in ledger.read(path):
        if record.round > 0:
            counts.append(_counts(algorithm, replica, wire.decode(record.value("broadcast", bytes))))
        if record.digest != replica.digest:  # of the plan after the round
            raise NoCoordinates(f"{config.model} is another model than the run's")
    if not counts:
        raise NoCoordinates("no round is finished")
    if isinstance(algorithm, FerretReference):
        title = f"seeds in use by block, of {config.ferret.K:,} in the pool"
        return Coordinates(blocks, counts, title, "seeds with a coefficient")
    by_norm = config.ferret.allocation in BY_NORM
    first = "round 1, by sqrt-size" if by_norm else "round 1"
    return Coordinates(blocks, counts, f"{replica.plan.K:,} coordinates by block", first=first)


def _skeleton(folder: Path, config: SimulationConfig) -> object:
    """The run's model without its weights, from its folder where it is finished."""
    stored = folder / "model"
    try:
        base = models.skeleton(str(stored) if stored.is_dir() else config.model, config.dtype)
        return adapters.attach_blank(base, config)
    except ConfigError as error:
        raise NoCoordinates(str(error)) from None


def _counts(algorithm: object, replica: PlanReplica, broadcast: Message) -> list[int]:
    """K_l in the round that ends with this broadcast, to which the replica's plan goes on."""
    if isinstance(algorithm, FerretReference):
        pool = broadcast.array("pool", "<f4", (replica.plan.K,))
        used: list[int] = np.count_nonzero(pool.reshape(len(replica.plan.blocks), -1), axis=1).tolist()
        return used
    assert isinstance(algorithm, Projecting)
    counts = [block.k for block in replica.plan.blocks]
    algorithm.allocate(replica, broadcast)
    return counts


def save_coordinates_plot(coordinates: Coordinates, label: str, folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg."""
    save(single(draw, coordinates, label), (9, height(coordinates)), folder, name)


def height(coordinates: Coordinates) -> float:
    """Inches that the picture needs."""
    count = len(coordinates.blocks)
    return 1.6 + 0.22 * count if count <= MOST_NAMES else 6.0


def draw(axes: Axes, coordinates: Coordinates, label: str, longest: int = 80) -> None:
    """K_l of each block in the last round, and in the first where they differ.

    longest: characters of a block's name; of longer ones the end is shown.
    """
    first, last = coordinates.counts[0], coordinates.counts[-1]
    places, differ = range(len(last)), first != last
    newest = f"round {len(coordinates.counts)}" if differ else "all rounds"
    axes.barh(places, last, color=LOSS, height=0.7, label=newest)
    if differ:
        _mark(axes, first, coordinates.first)
    if len(last) <= MOST_NAMES:
        names = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in coordinates.blocks]
        axes.set_yticks(list(places), names, fontsize=8)
    else:
        axes.set(ylabel="block, in the model's order")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=WHOLE, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    of_run = f"{plain(label)}: " if label else ""
    axes.set(title=f"{of_run}{coordinates.title}", xlabel=coordinates.axis)


def _mark(axes: Axes, counts: Sequence[int], label: str) -> None:
    places = range(len(counts))
    style = {"color": COLOURS[1], "markersize": 9, "markeredgewidth": 2.2}
    axes.plot(counts, places, "|", label=label, **style)  # type: ignore[arg-type]
    axes.legend(frameon=False, loc="lower right")
