"""Draws the pictures of concepts.md: python docs/draw_concepts.py"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

import ferret_ext
from ferret_ext.federated.plot import DOWN, GRID, INK, LOSS, UP, WHOLE, save, single

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).parent / "images"
SIZE = 20_000  # numbers of the update that is rebuilt


def draw_projection(axes: Axes) -> None:
    """delta -> gamma -> rebuilt, with the basis that nobody stores."""
    parts = (
        (0.0, 3.2, LOSS, "update, d numbers"),
        (4.6, 0.8, UP, "K coordinates\nand a seed"),
        (6.8, 3.2, DOWN, "estimate, d numbers"),
    )
    for left, width, colour, text in parts:
        axes.barh(0, width, left=left, height=0.5, color=colour)
        axes.text(left + width / 2, -0.42, text, ha="center", va="top")
    for start, end, text in ((3.3, 4.5, "project"), (5.5, 6.7, "reconstruct")):
        axes.annotate("", (end, 0), (start, 0), arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.6})
        axes.text((start + end) / 2, 0.12, text, ha="center", fontsize=9)
        axes.annotate(
            "",
            ((start + end) / 2, 0.3),
            ((start + end) / 2, 0.75),
            arrowprops={"arrowstyle": "->", "color": WHOLE},
        )
    axes.text(
        5.0, 0.82, "V, d x K signs, made from the seed on both sides and stored on neither", ha="center"
    )
    axes.set(xlim=(-0.2, 10.2), ylim=(-1.1, 1.15))
    axes.axis("off")


def draw_round(axes: Axes) -> None:
    """Who sends what in a round."""
    axes.text(5, 2.5, f"{'server':^44}", ha="center", va="center", color="white", bbox=_box(INK))
    for number, place in enumerate((1.2, 5.0, 8.8)):
        axes.text(place, 0.3, f"client {number}", ha="center", va="center", color="white", bbox=_box(LOSS))
        top, shift = 5 + 1.4 * (number - 1), 0.2
        for colour, start, end in (
            (UP, (place - shift, 0.65), (top - shift, 2.2)),
            (DOWN, (top + shift, 2.2), (place + shift, 0.65)),
        ):
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
    axes.text(0.1, 1.75, "up: a seed and\nK coordinates", color=UP, ha="left", va="center")
    axes.text(9.9, 1.75, "down: what all\nclients sent", color=DOWN, ha="right", va="center")
    axes.text(
        5,
        -0.45,
        "each client trains all weights; all rebuild the same weights, to the bit, from what was relayed",
        ha="center",
        fontsize=9,
    )
    axes.set(xlim=(0, 10), ylim=(-0.7, 2.9))
    axes.axis("off")


def draw_noise(axes: Axes) -> None:
    """Measured: how well the mean of rebuilt updates points along the update."""
    delta = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    counts = [2**n for n in range(7)]
    for K, colour in ((64, LOSS), (512, UP), (4096, DOWN)):
        found = []
        total = torch.zeros(SIZE)
        for number in range(1, counts[-1] + 1):
            total += ferret_ext.reconstruct(ferret_ext.project(delta, number, K), number, delta.shape)
            if number in counts:
                found.append(torch.cosine_similarity(total, delta, dim=0).item())
        expected = [(1 + (SIZE + 1) / (K * n)) ** -0.5 for n in counts]
        axes.plot(counts, found, "o", color=colour, label=f"K = {K:,}")
        axes.plot(counts, expected, color=colour, linewidth=1)
        assert fmean(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.05
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.grid(color=GRID, linewidth=0.6)
    axes.legend(frameon=False)
    axes.set(
        title=f"An update of {SIZE:,} numbers, rebuilt",
        xlabel="rebuilt updates in the mean, each with its own seed",
        ylabel="cosine with the update",
        ylim=(0, 1.02),
    )


def _box(colour: str) -> dict[str, str]:
    return {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "none"}


if __name__ == "__main__":
    save(single(draw_projection), (8, 2.4), IMAGES, "concept-projection")
    save(single(draw_round), (8, 3.4), IMAGES, "concept-round")
    save(single(draw_noise), (8, 4), IMAGES, "concept-noise")
