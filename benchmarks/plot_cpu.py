"""Draws the scaling table of bench_cpu.py's JSON: rates over K, a line for each d, between bounds and rivals.

    python benchmarks/plot_cpu.py benchmarks/results/FILE.json docs/images/cpu-scaling [--threads 1]

writes cpu-scaling.svg and .png there, on an opaque background, so that both can be read on dark pages too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#24292f", "#6e7781", "#e3e7eb"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "svg.hashsalt": "ferret",
}
PANELS = {"project": "read", "reconstruct_": "update"}  # and the yardstick that bounds it at small K
BOUNDS = {"philox": "Philox alone", "read": "reading memory", "update": "x += 1 in memory"}
RIVALS = {  # those whose rates lie apart
    "rival: numpy table": "numpy's bits",
    "rival: torch randn": "torch.randn",
    "rival: authors' loop": "published code's loop",
    "rival: scikit-learn": "scikit-learn",
}
Row = dict[str, Any]


def save_plot(run: dict[str, Any], threads: int, target: Path) -> None:
    """run: what bench_cpu.py wrote. Raises ValueError if it has no scaling on that many threads."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    machine, rows = run["machine"], [row for row in run["rows"] if row["threads"] == threads]
    cells = [row for row in rows if row["section"] == "scaling" and row["rate"] is not None]
    if not cells:
        raise ValueError(f"plot_cpu: expected rows of scaling on {threads} threads, got none")
    # of the sizes of a yardstick the largest, which is beyond the caches
    yardsticks = sorted((row for row in rows if row["section"] == "yardstick"), key=lambda row: row["bytes"])
    rates = {row["what"]: row["per_second"] / 1e9 for row in yardsticks}

    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = panels = figure.subplots(1, 2, sharey=True)
        for axes, (what, memory) in zip(panels, PANELS.items(), strict=True):
            draw_cells(axes, [row for row in cells if row["what"] == what])
            draw_bounds(axes, 32 * rates["philox"], rates[memory] / 4, BOUNDS[memory])
            axes.set_title(f"{what}, {'one thread' if threads == 1 else f'{threads} threads'}", loc="left")
        draw_rivals(left, rows)
        left.set_ylabel("basis elements a second, 10⁹")
        right.legend(title="d", frameon=False, loc="lower right", reverse=True)
        figure.supxlabel(f"{machine['processor']}, {machine['isa']} path", fontsize=9, color=FAINT)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target.with_suffix(".png"), dpi=160)
        figure.savefig(target.with_suffix(".svg"), metadata={"Date": None})


def draw_cells(axes: Axes, cells: list[Row]) -> None:
    """The larger d, the darker its line."""
    from matplotlib import colormaps

    axes.set(xscale="log", yscale="log", xlabel="K")
    columns = sorted({row["K"] for row in cells})
    axes.set_xticks(columns, [f"{K:g}" for K in columns])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=GRID, linewidth=0.6)
    numels = sorted({row["numel"] for row in cells})
    for index, numel in enumerate(numels):
        color = colormaps["viridis_r"](0.15 + 0.85 * index / max(1, len(numels) - 1))
        points = [(row["K"], row["rate"] / 1e9) for row in cells if row["numel"] == numel]
        axes.plot(*zip(*points, strict=True), label=power(numel), color=color, marker="o", markersize=3.5)


def draw_bounds(axes: Axes, generator: float, elements: float, memory: str) -> None:
    """generator: basis elements; elements: tensor elements that memory delivers; both 10^9 a second."""
    first, last = (float(K) for K in axes.get_xticks()[[0, -1]])
    knee = min(generator / elements, last)
    style: dict[str, Any] = {"color": FAINT, "linewidth": 1, "linestyle": "--", "zorder": 1}
    axes.plot([first, last], [generator] * 2, **style)
    axes.plot([first, knee], [elements * first, elements * knee], **style)
    label: dict[str, Any] = {"color": FAINT, "fontsize": 8.5, "textcoords": "offset points"}
    axes.annotate(BOUNDS["philox"], (last, generator), xytext=(0, 4), ha="right", **label)
    middle = math.sqrt(first * knee)
    label |= {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.annotate(memory, (middle, elements * middle), xytext=(-3, 3), ha="center", va="bottom", **label)


def draw_rivals(axes: Axes, rows: list[Row]) -> None:
    """Grey crosses, named at their largest K."""
    for what, name in RIVALS.items():
        points = [(row["K"], row["rate"] / 1e9) for row in rows if row["what"] == what]
        if points:  # scikit-learn is optional, and rivals run on one thread only
            axes.plot(*zip(*points, strict=True), color=FAINT, marker="x", markersize=5, linestyle="none")
            label: dict[str, Any] = {"color": INK, "fontsize": 8.5, "textcoords": "offset points"}
            axes.annotate(name, points[-1], xytext=(7, 0), va="center", **label)


def power(number: int) -> str:
    """10^4 as 10⁴."""
    exponent = round(math.log10(number))
    if number != 10**exponent:
        return f"{number:,}"
    return "10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="what bench_cpu.py --json wrote")
    parser.add_argument("target", type=Path, help="the plot's path, without .svg or .png")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    save_plot(json.loads(arguments.json.read_text()), arguments.threads, arguments.target)


if __name__ == "__main__":
    main()
