"""The picture of a run: loss by round, and bytes a client beside the whole model's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.units import in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#333333", "#dddddd"
LOSS, UP, DOWN, WHOLE = "#1f6f8b", "#d9822b", "#7a9e3a", "#9a9a9a"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ferret",
}


Size = tuple[float, float]  # width and height in inches
Draw = Callable[["Figure"], object]


@contextmanager
def _drawn(draw: Draw, size: Size, **style: object) -> Iterator[Figure]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        yield figure


def plain(text: str) -> str:
    """The text as it is, without what matplotlib reads as a formula or as a hidden label."""
    shown = text.replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def single(draw: Callable[..., None], *arguments: Any) -> Draw:
    """A picture of one pair of axes, which `draw(axes, *arguments)` fills."""
    return lambda figure: draw(figure.subplots(), *arguments)


def save(draw: Draw, size: Size, folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg."""
    with _drawn(draw, size) as figure:
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.set_layout_engine("none")  # as it is now: finding it again takes longer than drawing
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def inline_svg(draw: Draw, size: Size, prefix: str) -> str:
    """The picture as an <svg> for a page, in the page's own colour of text and, for the grid, --line.

    prefix: before all ids, so that no two pictures of a page share one.
    """
    text = io.StringIO()
    with _drawn(draw, size, **{"svg.fonttype": "none", "font.family": "sans-serif"}) as figure:
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    _, opening, rest = text.getvalue().partition("<svg ")
    svg = re.sub(r"<metadata>.*?</metadata>", "", opening + rest, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return svg.replace(INK, "currentColor").replace(GRID, "var(--line)")


def save_plot(history: Sequence[RoundMetrics], folder: Path) -> None:
    """Writes plot.png and plot.svg."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw_loss(left, history)
        draw_bytes(right, history)

    save(draw, (9, 3.8), folder, "plot")


def draw_loss(axes: Axes, history: Sequence[RoundMetrics]) -> None:
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
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def draw_bytes(axes: Axes, history: Sequence[RoundMetrics]) -> None:
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
    axes.set_xlim(left=10, right=max(sizes) * 60)
    log_bytes(axes)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set(title="Bytes a client and round", xlabel="bytes, logarithmic")


def log_bytes(axes: Axes) -> None:
    """A logarithmic x-axis of bytes, with ticks at 1 kB, 10 kB, 1 MB: quicker to read, and to draw."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 100 * low:  # else there may be no power of ten in it
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda size, _: in_words(size).replace(".0 ", " "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(size: float, full: float) -> str:
    """The size and, where it is smaller than the full model, how many times."""
    return f"{in_words(size)}, {full / size:,.0f}× less" if 0 < size < full else in_words(size)
