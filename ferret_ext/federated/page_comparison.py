"""The page of a comparison: its table, what each variant sent, and its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ferret_ext.federated import compare, plot, plot_comparison
from ferret_ext.federated.compare import COMPARISON, Row
from ferret_ext.federated.page import Figure, Page, Picture, Table
from ferret_ext.federated.page_run import environment, picture, read_json
from ferret_ext.federated.settings import ConfigError


def read(folder: Path) -> Page:
    """Raises ConfigError."""
    content = read_json(folder / COMPARISON)
    try:
        rows = [Row(**row) for row in content["rows"]]
        runs, target = content["runs"], float(content["target_loss"])
        return _page(folder, rows, runs, target)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ConfigError(f"folder: {folder / COMPARISON} is damaged: {error}") from None


def _page(folder: Path, rows: Sequence[Row], runs: Sequence[dict[str, Any]], target: float) -> Page:
    head, *cells = compare.table(rows, target)
    seeds = sorted({run["seed"] for run in runs})
    best, least = min(rows, key=lambda row: row.loss), min(rows, key=lambda row: row.bytes_up)
    return Page(
        title=f"Comparison {folder.absolute().name}",
        summary=f"{len(rows)} variants on {runs[0]['model']}, {runs[0]['data']}; "
        f"seeds {', '.join(map(str, seeds))}",
        figures=[
            Figure("lowest evaluation loss", f"{best.loss:.4f}", best.variant),
            Figure("fewest bytes up, a client and round", f"{least.bytes_up:,.0f}", least.variant),
            Figure("target loss", f"{target:.4f}"),
        ],
        pictures=list(_pictures(runs)),
        tables=[
            Table(
                "Variants",
                head,
                cells,
                note="Seconds and bytes are a client's of one round; losses are means over seeds.",
            ),
            _sent(rows, runs),
            _runs(runs),
            environment(runs[0].get("environment", {})),
        ],
    )


def _pictures(runs: Sequence[dict[str, Any]]) -> Iterator[Picture]:
    for index, (along, _, _) in enumerate(plot_comparison.AXES):
        draw = plot.single(plot_comparison.draw_panel_alone, runs, index)
        yield picture(f"{along.split()[0].capitalize()} and loss", draw, 3.9)


def _sent(rows: Sequence[Row], runs: Sequence[dict[str, Any]]) -> Table:
    full = runs[0]["rounds"][-1]["model_bytes"]
    cells = [
        (row.variant, *(cell for size in (row.bytes_up, row.bytes_down) for cell in _against(size, full)))
        for row in rows
    ]
    note = f"Bytes of a client in a round. The whole model would be {full:,} each way."
    head = ("variant", "bytes up", "times less", "bytes down", "times less")
    return Table("What each variant sent", head, cells, note=note)


def _against(size: float, full: float) -> tuple[str, str]:
    return f"{size:,.0f}", f"{full / size:,.1f}" if size > 0 else ""


def _runs(runs: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for run in runs:
        last = run["rounds"][-1]
        missing = sum(len(row["left_out"]) + len(row["rejected"]) for row in run["rounds"])
        rows.append(
            (run["variant"], str(run["seed"]), str(last["round"]), f"{last['eval_loss']:.4f}", str(missing))
        )
    head = ("variant", "seed", "rounds", "evaluation loss", "updates left out or rejected")
    return Table("Runs", head, rows)
