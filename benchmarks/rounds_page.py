"""The sections of docs/quality.md on plans and rounds, from results/plans.json and results/rounds.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ferret_ext.federated.plot import STYLE
from ferret_ext.federated.plot_comparison import COLOURS

Row = Mapping[str, Any]
RATE = 50e9  # basis elements a second and core, docs/performance.md's order of magnitude
DRAWN = ("ferret", "fedavg", "ferret momentum 0.5", "fedavg momentum 0.5")  # of the study "server"
TASKS = {
    "gsm8k": "GSM8K",
    "languages": "languages",
    "dolly": "Dolly",
}
STUDIES = {
    "server": "server's step",
    "adaptive": "adaptive server's step",
    "local": "local optimiser",
    "bases": "bases",
    "steps": "local steps",
    "clients": "clients a round",
    "sampling": "2 of 40 clients",
}

PLANS = """## The plan `auto`

`ferret.granularity=auto`, the default, starts from the tensors. Neighbours are joined until a block has the
size of two coordinates, 2 d / K elements: where K is small, a scale a tensor would take a large part of the
bytes, and a coordinate a tensor more than small ones need. Then blocks of more than 64 coordinates are cut
into equal pieces (more for forms of few bits, so that a scale is a sixty-fourth of a block's bits), of at
least 1,024 elements. Pieces share their block's coordinates evenly, which keeps the error, and the work
falls. All of it follows from shapes and settings, so that every party makes the same plan, whatever its
processor.

So many bytes of codes and scales as `choice8`, after `benchmarks/plans_study.py`: closed forms of the
error of a client's first update on GSM8K, in round 1 and by `curvature` once the norms are known; seconds
of one core for its projection, measured, and for 1.1 billion parameters computed at PERSECOND basis
elements a second.

TABLE

"""

ROUNDS = """## Rounds

`benchmarks/rounds_study.py`: what else a round is made of, at 512 bytes a client and round (`choice8`, K =
406, a block a tensor, step 0.8, warm-up 3 unless the case is about them; int8, K = 457 where bases are
compared). GSM8K with 3 clients; names and dates in eight languages, a client each, of which three are drawn
a round (`benchmarks/languages.py`; for 2 of 40, dirichlet by language); Dolly by category. So that there
could be many runs, a local step has one record of GSM8K or Dolly, two of languages, where the presets have
four; ROUNDCOUNT rounds, T = 10 unless said. The share is of FedAvg's loss reduction with the plain step, the
same seed and as many local steps. Cases of one seed are trials by which a rate was chosen.

TABLE

![Loss against rounds, bytes and seconds](images/quality-rounds.svg)

Seconds of one case were taken on several machines and while other programs had most of the processor: they
compare, and no more.

- **Server**: within ten rounds momentum and adaptive steps gain nothing for Ferret, on either task and with
  any seed. Momentum goes on with the noise of former rounds too, and the root of Adam's second moments is
  that of the noise, which is many times the update. For FedAvg, whose mean has no such noise, momentum made
  no difference beyond the spread of the seeds; nor did it for Ferret where 2 of 40 clients are drawn. The
  plain step stays the default.
- **Local optimiser**: AdamW, at the best of three rates, was far behind SGD for Ferret, though not for
  FedAvg; perhaps because an update that moves all weights alike is long for what it gains, and the noise of
  its reconstruction goes by its length. SGD stays the default.
- **Local steps**: for the same work in all, five steps a round were a little better than ten, at twice the
  bytes; twenty and fifty lose.
- **Bases**: with three clients a basis of their own was no better than one for all, of which the server
  relays a mean instead of three updates.
- **Clients**: 512 bytes each are worth more the more there are, as their noise averages out.
- **Sampling**: with 2 of 40 clients a round, 5 %, Ferret's 512 bytes come to what FedAvg comes to on
  languages. On Dolly the loss goes up and down by up to a nat from one draw of two skewed clients to the
  next, so that the last round's share says little; the best rounds of the three seeds are at 3.96, 4.15 and
  3.88 with Ferret, 3.49, 3.64 and 3.48 with FedAvg.

"""


def plans_section(rows: Sequence[Row]) -> str:
    return PLANS.replace("PERSECOND", f"{RATE / 1e9:.0f} x 10^9").replace("TABLE", plans_table(rows))


def plans_table(rows: Sequence[Row]) -> str:
    lines = [["model", "bytes", "plan", "L", "K", "error, round 1", "later", "project, s"]]
    for row in rows:
        own = [row["model"], f"{row['bytes']:,}", row["granularity"]]
        if "L" not in row:
            lines.append([*own, "none: fewer coordinates than tensors", "", "", "", ""])
            continue
        errors = [f"{row[name]:,.1f}" if name in row else "" for name in ("first", "later")]
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else f"{row['columns'] / RATE:,.0f} (computed)"
        lines.append([*own, f"{row['L']:,}", f"{row['K']:,}", *errors, seconds])
    return table(lines)


def rounds_section(rows: Sequence[Row]) -> str:
    lines = [["task", "about", "case", "seeds", "loss", "share", "spread", "bytes up", "down", "local, s"]]
    lines += [cells_of(row, rows) for row in ordered(rows)]
    rounds = {len(run["losses"]) - 1 for row in rows if row["study"] == "server" for run in runs_of(row)}
    text = ROUNDS.replace("ROUNDCOUNT", " or ".join(map(str, sorted(rounds))))
    return text.replace("TABLE", table(lines))


def ordered(rows: Sequence[Row]) -> Iterator[Row]:
    """By task, then by study."""
    for task in TASKS:
        for study in STUDIES:
            yield from (row for row in rows if (row["task"], row["study"]) == (task, study))


def runs_of(row: Row) -> list[Row]:
    return list(row["runs"].values())


def cells_of(row: Row, rows: Sequence[Row]) -> list[str]:
    runs, reached = runs_of(row), shares(row, rows)
    spread = f"{min(reached):.1%} .. {max(reached):.1%}" if len(reached) > 1 else ""
    return [
        TASKS[row["task"]],
        STUDIES[row["study"]],
        row["name"],
        str(len(runs)),
        f"{fmean(run['losses'][-1] for run in runs):.3f}",
        f"{fmean(reached):.1%}" if reached else "",
        spread,
        f"{fmean(run['bytes_up'] for run in runs):,.0f}",
        f"{fmean(run['bytes_down'] for run in runs):,.0f}",
        f"{fmean(run['seconds']['local'] for run in runs):.2f}",
    ]


def shares(row: Row, rows: Sequence[Row]) -> list[float]:
    """The share of FedAvg's loss reduction that each seed reaches which FedAvg has too."""
    kin = {"sampling": "sampling"}.get(row["study"], "server")
    measure = next(
        (it for it in rows if (it["task"], it["study"], it["name"]) == (row["task"], kin, "fedavg")), None
    )
    best = measure["runs"] if measure else {}
    return [
        (run["losses"][0] - run["losses"][-1]) / (best[seed]["losses"][0] - best[seed]["losses"][-1])
        for seed, run in row["runs"].items()
        if seed in best
    ]


def save_plot(rows: Sequence[Row], folder: Path, task: str = "languages") -> None:
    """quality-rounds.svg and .png: mean loss over the seeds against rounds, bytes and seconds of a client."""
    shown = [row for row in rows if (row["task"], row["study"]) == (task, "server") and row["name"] in DRAWN]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharey=True)
        for row, colour in zip(shown, COLOURS, strict=False):
            runs = runs_of(row)
            losses = [fmean(each) for each in zip(*(run["losses"] for run in runs), strict=True)]
            traffic = fmean(run["bytes_up"] + run["bytes_down"] for run in runs)
            seconds = fmean(sum(run["seconds"].values()) for run in runs)
            for axes, unit in zip(panels, (1.0, traffic, seconds), strict=True):
                first = int(unit == traffic)  # no bytes have no place on a logarithmic scale
                along = [unit * round_ for round_ in range(first, len(losses))]
                axes.plot(along, losses[first:], color=colour, marker="o", markersize=3, label=row["name"])
        named = ("rounds", "bytes up and down, a client", "seconds, a client")
        for axes, name in zip(panels, named, strict=True):
            axes.set(xlabel=name)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        panels[1].set(xscale="log")
        panels[0].set(ylabel="evaluation loss")
        panels[0].legend(frameon=False)
        figure.savefig(folder / "quality-rounds.png", dpi=150)
        figure.savefig(folder / "quality-rounds.svg", metadata={"Date": None})


def table(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
