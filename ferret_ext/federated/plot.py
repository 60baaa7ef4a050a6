"""The picture of a run: loss by round, and bytes a client beside the whole model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferret_ext.federated.metrics import RoundMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, LOSS, UP, DOWN, WHOLE = "#333333", "#1f6f8b", "#d9822b", "#7a9e3a", "#9a9a9a"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ferret",
}


def save_plot(history: Sequence[RoundMetrics], folder: Path) -> None:
    """Writes plot.png and plot.svg."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw_loss(left, history)
        _draw_bytes(right, history)
        figure.savefig(folder / "plot.png", dpi=150)
        figure.savefig(folder / "plot.svg", metadata={"Date": None})


def _draw_loss(axes: Axes, history: Sequence[RoundMetrics]) -> None:
    from matplotlib.ticker import MaxNLocator

    rounds = [metrics.round for metrics in history]
    losses = [metrics.eval_loss for metrics in history]
    axes.plot(rounds, losses, color=LOSS, marker="o", markersize=4, linewidth=1.8)
    for index in (0, -1):
        axes.annotate(
            f"{losses[index]:.2f}",
            (rounds[index], losses[index]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=LOSS,
        )
    axes.set(title="Evaluation loss", xlabel="round", ylabel="nats a response token")
    axes.margins(x=0.08, y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _draw_bytes(axes: Axes, history: Sequence[RoundMetrics]) -> None:
    """Mean bytes that a client sent and received in a round, on a logarithmic axis."""
    turns = sum(len(metrics.clients) for metrics in history) or 1
    bars = {
        "sent": (sum(metrics.payload_bytes_up for metrics in history) / turns, UP),
        "received": (sum(metrics.payload_bytes_down for metrics in history) / turns, DOWN),
        "full model": (float(history[0].model_bytes), WHOLE),
    }
    sizes = [size for size, _ in bars.values()]
    drawn = axes.barh(list(bars), sizes, color=[color for _, color in bars.values()], height=0.55)
    axes.bar_label(drawn, [_label(size, sizes[-1]) for size in sizes], padding=5)
    axes.set_xscale("log")
    axes.set_xlim(left=10, right=max(sizes) * 60)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set(title="Bytes a client and round", xlabel="bytes, logarithmic")


def _label(size: float, full: float) -> str:
    """The size and, where it is smaller than the full model, how many times."""
    return f"{_size(size)}, {full / size:,.0f}× less" if 0 < size < full else _size(size)


def _size(number: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"
