"""Draws what many_clients.py computed: bytes of the server and the ledger, and a newcomer's seconds.

    python benchmarks/plot_many.py benchmarks/results/many-clients.json docs/images/many-clients

writes many-clients.svg and .png there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_cpu import FAINT, GRID, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"per-client": "#1f6f8b", "shared-round": "#d9822b", "fixed-pool": "#7a9e3a"}
DASHES = ("--", "-", ":")  # by clients a round, the fewest first
PANELS: dict[str, tuple[str, dict[float, str]]] = {
    "server_sends": ("the server sends in a round", {1e6: "1 MB", 1e9: "1 GB", 1e12: "1 TB"}),
    "ledger_bytes": ("the ledger, which a newcomer receives", {1e6: "1 MB", 1e9: "1 GB"}),
    "newcomer_seconds": (
        "a newcomer rebuilds for",
        {60: "1 min", 3600: "1 h", 86400: "1 day", 7 * 86400: "1 week"},
    ),
}


def save_plot(run: dict[str, Any], target: Path) -> None:
    """run: what many_clients.py wrote."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, facts = run["rows"], run["machine"]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(PANELS))
        for axes, (name, (title, ticks)) in zip(panels, PANELS.items(), strict=True):
            draw(axes, rows, name)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_yticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        mark_whole_weights(panels[0], rows)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
        )
        figure.supxlabel(
            f"round, of {facts['clients']:,} clients; computed, by one core's rate ({facts['processor']})",
            fontsize=9,
            color=FAINT,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target.with_suffix(".png"), dpi=160)
        figure.savefig(target.with_suffix(".svg"), metadata={"Date": None})


def draw(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """A line for each policy and number of clients a round."""
    axes.set(xscale="log", yscale="log")
    axes.grid(color=GRID, linewidth=0.6)
    numbers = sorted({row["chosen"] for row in rows})
    for row in rows:
        points = [(at["round"], at[name]) for at in row["by_round"]]
        label = f"{row['policy']}, {row['chosen']:,} a round"
        style = DASHES[numbers.index(row["chosen"]) % len(DASHES)]
        axes.plot(*zip(*points, strict=True), color=COLORS[row["policy"]], linestyle=style, label=label)


def mark_whole_weights(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What the server would send if all of a round's clients got the weights."""
    for chosen in sorted({row["chosen"] for row in rows}):
        size = chosen * rows[0]["model_bytes"]
        axes.axhline(size, color=FAINT, linewidth=0.8)
        style: dict[str, Any] = {"color": FAINT, "fontsize": 8, "textcoords": "offset points"}
        axes.annotate(f"weights to {chosen:,}", (1, size), xytext=(2, 3), **style)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="what many_clients.py --json wrote")
    parser.add_argument("target", type=Path, help="the plot's path, without .svg or .png")
    arguments = parser.parse_args()
    save_plot(json.loads(arguments.json.read_text()), arguments.target)


if __name__ == "__main__":
    main()
