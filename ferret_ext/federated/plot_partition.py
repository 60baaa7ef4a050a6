"""The picture of who holds what: each client's training examples, by key where there are keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.plot import GRID, plain, save, single

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart, and darker ones of the same hues.
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#003f63",
    "#8a5f00",
    "#005a42",
)
OTHERS, PLAIN = "#b5b5b5", "#1f6f8b"
NAMED = 60  # clients that have room for their names
LONG = 44  # characters of a name that are shown


def save_partition_plot(holdings: Holdings, folder: Path, name: str = "partition") -> None:
    """Writes NAME.png and NAME.svg: a bar a client, with names where each client has one."""
    save(single(draw_partition, holdings), (9, height(holdings)), folder, name)


def height(holdings: Holdings) -> float:
    """Inches that the picture needs."""
    return max(2.2, 0.9 + 0.19 * len(holdings.sizes)) if _named(holdings) else 3.8


def draw_partition(axes: Axes, holdings: Holdings) -> None:
    if _named(holdings):
        _draw_names(axes, holdings)
    else:
        _draw_stacks(axes, holdings)


def _named(holdings: Holdings) -> bool:
    return holdings.names is not None and len(holdings.names) <= NAMED


def _draw_names(axes: Axes, holdings: Holdings) -> None:
    """A horizontal bar a client, named by its value of the column."""
    names = [f"{_short(name)} ({client})" for client, name in enumerate(holdings.names or [])]
    drawn = axes.barh(names, holdings.sizes, color=PLAIN, height=0.7)
    axes.bar_label(drawn, [f"{size:,}" for size in holdings.sizes], padding=4, fontsize=8)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.margins(x=0.08)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(
        title=_title(holdings), xlabel="training examples", ylabel=f"{_short(holdings.column or '')} (client)"
    )


def _draw_stacks(axes: Axes, holdings: Holdings) -> None:
    """A vertical bar a client, of pieces by key; the rarest keys share one colour."""
    from matplotlib.ticker import MaxNLocator

    number = len(holdings.sizes)
    width = min(0.1 + 0.1 * number, 0.8 if number <= 40 else 1.0)  # few bars need not fill the picture
    bottom = [0] * number
    layers = _layers(holdings)
    many = len(layers) == 1 and number > NAMED
    for label, colour, pieces in layers:
        shown = sorted(pieces, reverse=True) if many else pieces
        axes.bar(range(number), shown, width, bottom=bottom, color=colour, label=label, linewidth=0)
        bottom = [below + piece for below, piece in zip(bottom, pieces, strict=True)]
    if len(layers) > 1:
        axes.figure.legend(
            loc="outside right upper",
            frameon=False,
            fontsize=8,
            title=_short(holdings.column or ""),
            reverse=True,
        )
    axes.set_xlim(-0.6, number - 0.4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    client = "clients, the largest first" if many else "client"
    axes.set(title=_title(holdings), xlabel=client, ylabel="training examples")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _layers(holdings: Holdings) -> list[tuple[str, str, list[int]]]:
    """Label, colour and each client's examples, from the bottom up."""
    if len(holdings.keys) < 2 or holdings.names is not None:
        return [("", PLAIN, holdings.sizes)]
    keys = list(holdings.keys)
    shown = keys if len(keys) <= len(COLOURS) else keys[: len(COLOURS) - 1]
    layers = [
        (_short(key), colour, [held.get(key, 0) for held in holdings.by_key])
        for key, colour in zip(shown, COLOURS, strict=False)
    ]
    if rest := keys[len(shown) :]:
        pieces = [sum(held.get(key, 0) for key in rest) for held in holdings.by_key]
        layers.append((f"{len(rest):,} others", OTHERS, pieces))
    return layers


def _title(holdings: Holdings) -> str:
    by = f" by {_short(holdings.column or '')}" if holdings.keys else ""
    number = len(holdings.sizes)
    return f"Who holds what: {holdings.kind}{by}, {number:,} client{'s' if number > 1 else ''}"


def _short(name: str) -> str:
    """The name, not too long."""
    return plain(name if len(name) <= LONG else f"{name[: LONG - 1]}…")
