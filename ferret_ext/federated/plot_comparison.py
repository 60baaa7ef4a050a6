"""The picture of a comparison: loss against rounds, bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferret_ext.federated.plot import GRID, log_bytes, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f6f8b", "#d9822b", "#7a9e3a", "#8e4585", "#c0392b", "#555555")
DASHES = ("-", "--", ":")  # with the colours, for up to 18 variants

Along = Callable[[dict[str, Any]], float]


def _bytes(round_: dict[str, Any]) -> float:
    return float(round_["payload_bytes_up"] + round_["payload_bytes_down"])


def _seconds(round_: dict[str, Any]) -> float:
    parts = ("local", "project", "rebuild", "server")
    return float(sum(round_[f"seconds_{part}"] for part in parts))


AXES: tuple[tuple[str, Along, bool], ...] = (
    ("rounds", lambda round_: 1.0 if round_["round"] else 0.0, False),
    ("bytes sent and received, all clients", _bytes, True),
    ("seconds of all clients and the server", _seconds, False),
)


def save_comparison_plot(runs: Sequence[dict[str, Any]], folder: Path, name: str = "comparison") -> None:
    """Writes NAME.png and NAME.svg."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3, sharey=True)
        for index, panel in enumerate(panels):
            draw_panel(panel, runs, index)
        panels[0].set(ylabel="evaluation loss, nats a response token")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)

    save(draw, (13, 4.6), folder, name)


def draw_panel(panel: Axes, runs: Sequence[dict[str, Any]], index: int) -> None:
    """The loss of all variants along one of AXES."""
    from matplotlib.ticker import MaxNLocator

    label, along, logarithmic = AXES[index]
    _draw(panel, runs, along, first=1 if logarithmic else 0)
    panel.set(xlabel=label)
    if logarithmic:
        log_bytes(panel)
    elif index == 0:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(axis="y", color=GRID, linewidth=0.6)
    if (limits := loss_limits(runs)) is not None:
        panel.set_ylim(limits)


def loss_limits(runs: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Where the losses' axis ends if some run diverges, so that the others can still be told apart."""
    losses = [round_["eval_loss"] for run in runs for round_ in run["rounds"]]
    highest = 1.25 * max(run["rounds"][0]["eval_loss"] for run in runs)
    return (0.9 * min(losses), highest) if max(losses) > highest else None


def draw_panel_alone(panel: Axes, runs: Sequence[dict[str, Any]], index: int) -> None:
    """The same as a picture of its own, with names below."""
    draw_panel(panel, runs, index)
    panel.set(ylabel="evaluation loss, nats a response token")
    handles, labels = panel.get_legend_handles_labels()
    panel.figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _draw(panel: Axes, runs: Sequence[dict[str, Any]], along: Along, first: int) -> None:
    """A line a variant from round `first` on, the mean over its seeds, in a band of the least and largest."""
    for index, variant in enumerate(dict.fromkeys(run["variant"] for run in runs)):
        own = [run["rounds"] for run in runs if run["variant"] == variant]
        losses = list(
            zip(*([round_["eval_loss"] for round_ in rounds[first:]] for rounds in own), strict=True)
        )
        places = [list(accumulate(map(along, rounds)))[first:] for rounds in own]
        x = [sum(at) / len(at) for at in zip(*places, strict=True)]
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        mean = [sum(of_round) / len(of_round) for of_round in losses]
        alone = "o" if len(x) == 1 else None  # a line of one point is none
        panel.plot(x, mean, color=colour, linestyle=dash, linewidth=1.8, marker=alone, label=plain(variant))
        panel.fill_between(x, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.15)
