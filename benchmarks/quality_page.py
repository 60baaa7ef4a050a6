"""docs/quality.md and its pictures, from the runs and errors kept as JSON.

    python benchmarks/quality_page.py [--check]

benchmarks/results/quality-errors.json and quality-NAME.json come from benchmarks/quality.py, plans.json from
plans_study.py, rounds.json from rounds_study.py. --check writes nothing, and fails if the page is not what
the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from quality import shares
from rounds_page import plans_section, rounds_section, table
from rounds_page import save_plot as save_rounds_plot

from ferret_ext.federated.plot import INK, STYLE
from ferret_ext.federated.plot_comparison import COLOURS

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
STYLES = (("-", "o"), ("--", "s"))  # of a line and its points; the second where colours come again
TITLES = {
    "gsm8k": "GSM8K: grade-school word problems, 3 clients",
    "codealpaca": "CodeAlpaca: a programming language a client",
    "languages": "Outside English: names and dates in eight languages, one a client",
}

HEAD = """# Quality a byte

Written by `python benchmarks/quality_page.py` from `benchmarks/results/quality-*.json`, `plans.json` and
`rounds.json`, which come from `benchmarks/quality.py`, `plans_study.py` and `rounds_study.py`. A random
basis costs next to nothing to make, a byte costs what it always did; so many coordinates of few bits are
sent instead of few of many, and each is the best of many that are not sent.

## Forms of coordinates

| `ferret.coordinates` | a coordinate is sent as | bits |
| --- | --- | ---: |
| `float32`, `float16` | a float (beside `float16` a scale a block) | 32, 16 |
| `int8`, `int4`, `int2` | one of 2^B levels, a scale a block | B |
| `int1` | its sign, a scale a block | 1 |
| `choiceC`, C = 4, 8, 10, 12 | sign and number of the largest of 2^C candidates, a scale a block | C + 1 |

Candidates are columns of the basis like any other: 2^C times as many are projected on, and of each 2^C
one is kept. Levels, scales and bytes are in [streams.md](streams.md), "Packed coordinates", and
[wire.md](wire.md). `auto`, the default, is `choice8` where clients have seeds of their own, `int8` where
a round shares one.

The best setting found for 512 bytes, as measured below, is the default but for K and the step, which a
preset with published settings has to be told:

```
ferret simulate --preset small/gsm8k --model MODEL --data gsm8k/ --out runs/512 ferret.K=415 \\
    ferret.coordinates=auto ferret.allocation=curvature ferret.granularity=auto \\
    server_learning_rate=0.8 ferret.server_warmup=3
```

## Theory

Let delta be a block's update of d elements and x_k = v_k . delta its product with column k, of which K
are sent. Over bases x_k is nearly normal for d large (central limit theorem) with variance rho
||delta||^2 = ||delta||^2 / d.

- **Floats** (arXiv 2409.06277, equation 6): E ||delta~ - delta||^2 = (d - 1) / K ||delta||^2 for
  `rademacher`.
- **Levels Q(x)**: take delta~ = s sum_k Q(x_k) v_k with s such that the component along delta has mean
  delta. Since E[v_k Q(x_k)] = delta E[x Q] / ||delta||^2 for normal x, the error is d / (K w)
  ||delta||^2 to first order in d / K, with the *worth* of a coordinate w = E[x Q]^2 / (E[x^2] E[Q^2]):
  2/pi = 0.637 for a sign, 0.881 for two bits, 0.988 for four, 1.000 for eight, at the steps that lose
  least.
- **Choice**: with x the largest of 2^C candidates by magnitude and its sign sent, w = E[max |x|]^2 over
  E[x^2], more than 1; it grows like 2 ln 2^C, so that C + 1 bits tend to the 2 ln 2 = 1.386 a bit that
  the rate-distortion function of a normal source allows at low rates.

| | float16 | int8 | int4 | int2 | int1 | choice4 | choice8 | choice12 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
WORTH

**Bias.** A float reconstruction is unbiased for every delta. Of the others the mean over bases is delta
as far as x is normal. The scale is sum gamma^2 over sum level gamma, so that the inner product of what
is read with the exact coordinates is that of the exact ones: for a single coordinate (K_l = 1) a sign
loses nothing, and an update of one element, whose x are not normal at all, is still rebuilt without
bias. Scales travel as bytes, at most 3% off.

Checked by simulation, one block of a normal update, so many bytes of codes, mean over seeds:

FORMS

## Blocks and allocation

Block l contributes ||delta_l||^2 (d_l - 1) / K_l. With sum K_l = K this is least for K_l ~ ||delta_l||
sqrt(d_l), `mse`; `sqrt-size` is the same where nothing is known of the norms. For equal norms an element
it does not depend on how a model is cut, while the work, sum d_l K_l, falls like 1 / L: cutting is free,
and where norms differ and are known it gains. The trained update is a client's first on GSM8K; K =
16,384 floats.

PLANS

Norms of finer blocks than tensors would gain more, but everybody must know them before the round, so they
would have to be sent. An allocation by norms therefore goes by the last round's, from what was relayed.

What counts in the end is not the error but what it does to the loss, which is the error weighted by the
loss's curvature. Where that goes like the update's own mean square (as for gradients of a log-likelihood
at a minimum) the best allocation would be K_l ~ ||delta_l||^2; between the two lies `curvature`, K_l ~
||delta_l||^(3/2) d_l^(1/4), the default.

"""

FRONTIER = """## TITLE

`benchmarks/quality.py frontier`, seeds SEEDS: the share of FedAvg's loss reduction that Ferret reaches
after ROUNDS rounds from the same start, with the same local training and the same seed. Bytes are a
client's of one round: those of coordinates and scales, and of the whole message as it was sent. The step
is `server_learning_rate`, reached over as many rounds as `ferret.server_warmup` says; Ferret's were chosen
by trials on GSM8K's seeds 0 and 1, FedAvg's is 1 throughout, so that shares above 100% are over a FedAvg
that a warm-up might help too. The first updates are several times as long as later ones, and so is the
noise of their reconstruction: a step that starts small loses little and saves a lot.

TABLE

![Share of FedAvg's loss reduction against bytes](images/quality-NAME.svg)

"""


PHASES = """## What it costs in time

`benchmarks/quality.py phases`, the 260,000-parameter model on GSM8K: milliseconds in which a client projects
and packs its update, and in which anybody rebuilds the updates of three clients, on each path of one core
(PROCESSOR). A client's local round takes LOCAL ms there. Paths give the same bits, so the share of FedAvg's
loss reduction is the same for all of them; it is that of the table above. Candidates are projected on but
not rebuilt from, so that choices cost the client alone.

TABLE

"""


def page(
    errors: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    plans: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
    phases: Mapping[str, Any],
) -> str:
    """The page in Markdown. errors, plans, rounds: rows of the files of that name; runs: of the others.

    phases: the whole file.
    """
    by_form = [row for row in errors if row["table"] == "form"]
    by_plan = [row for row in errors if row["table"] == "plan"]
    text = HEAD.replace("WORTH", worths(by_form)).replace("FORMS", forms_table(by_form))
    text = text.replace("PLANS", plans_table(by_plan)) + plans_section(plans)
    frontiers = "".join(section(name, runs[name]) for name in TITLES if name in runs)
    return text + frontiers + phases_section(phases, runs["gsm8k"]) + rounds_section(rounds)


def phases_section(phases: Mapping[str, Any], frontier: Sequence[Mapping[str, Any]]) -> str:
    """A line a form: milliseconds of projecting + rebuilding by path."""
    rows, of_form = phases["rows"], {row["name"]: row for row in frontier}
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    lines = [["form", "bytes", "K", "share", *(f"{isa}: project + rebuild" for isa in isas)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        own, form = [row for row in rows if row["name"] == name], of_form[name]
        times = [
            f"{1e3 * row['project']['median']:.2f} + {1e3 * row['rebuild']['median']:.2f}" for row in own
        ]
        share = f"{fmean(shares(form, frontier[0])):.1%}"
        plan = ", plan auto" if form.get("granularity") == "auto" else ""
        lines.append([form["kind"] + plan, f"{form['bytes']:,}", f"{own[0]['K']:,}", share, *times])
    text = PHASES.replace("PROCESSOR", phases["machine"]["processor"])
    return text.replace("LOCAL", f"{1e3 * rows[0]['local']:,.0f}").replace("TABLE", table(lines))


def worths(rows: Sequence[Mapping[str, Any]]) -> str:
    """Worth of a coordinate, and of a bit, from the closed forms."""
    of = {row["form"]: row["d"] / (row["K"] * row["theory"]) for row in rows}
    shown = ("float16", "int8", "int4", "int2", "int1", "choice4", "choice8", "choice12")
    bits = {"float16": 16, **{f"int{b}": b for b in (8, 4, 2, 1)}, "choice4": 5, "choice8": 9, "choice12": 13}
    lines = ["| worth of a coordinate | " + " | ".join(f"{of[form]:.2f}" for form in shown) + " |"]
    lines.append("| worth of a bit | " + " | ".join(f"{of[form] / bits[form]:.3f}" for form in shown) + " |")
    return "\n".join(lines)


def forms_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [["form", "bytes", "K", "error / norm^2", "theory"]]
    lines += [
        [row["form"], str(row["bytes"]), str(row["K"]), f"{row['error']:.2f}", f"{row['theory']:.2f}"]
        for row in rows
    ]
    return table(lines)


def plans_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a cut; measured errors, and in brackets what the closed form says."""
    trained = [row for row in rows if row["update"] == "trained"]
    normal = {row["L"]: row for row in rows if row["update"] == "normal"}
    allocations = list(dict.fromkeys(row["allocation"] for row in trained))
    lines = [["L", "normal update, size", *(f"trained, {name}" for name in allocations), "project, ms"]]
    for blocks in dict.fromkeys(row["L"] for row in trained):
        of = {row["allocation"]: row for row in trained if row["L"] == blocks}
        cells = [f"{row['error']:.2f} ({row['theory']:.2f})" for row in (normal[blocks], *of.values())]
        lines.append([f"{blocks:,}", *cells, f"{1e3 * of['size']['seconds']:.1f}"])
    return table(lines)


def section(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    fedavg = rows[0]
    seeds = sorted({seed for row in rows for seed in row["runs"]})
    rounds = len(next(iter(fedavg["runs"].values()))["losses"]) - 1
    names = (
        "form",
        "allocation",
        "blocks",
        "K",
        "bytes",
        "message",
        "step",
        "warm-up",
        "seeds",
        "loss",
        "share",
        "spread",
    )
    lines = [list(names)]
    for row in rows:
        runs = list(row["runs"].values())
        reached = shares(row, fedavg)
        sent = fmean(run["bytes_up"] for run in runs)
        own, step = ["fedavg", "", "", "", f"{sent:,.0f}"], ["1", "0"]
        if "kind" in row:
            own = [row["kind"], row["allocation"], row.get("granularity", "tensor")]
            own += [f"{runs[0]['K']:,}", f"{row['bytes']:,}"]
            step = [f"{row['server_learning_rate']:g}", str(row.get("server_warmup", 0))]
        spread = f"{min(reached):.2%} .. {max(reached):.2%}" if len(runs) > 1 else "one seed"
        loss = f"{fmean(run['losses'][-1] for run in runs):.3f}"
        lines.append([*own, f"{sent:,.0f}", *step, str(len(runs)), loss, f"{fmean(reached):.2%}", spread])
    text = FRONTIER.replace("TITLE", TITLES[name]).replace("NAME", name)
    text = text.replace("SEEDS", ", ".join(seeds)).replace("ROUNDS", str(rounds))
    return text.replace("TABLE", table(lines))


def save_plot(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """quality-NAME.svg and .png: share against bytes on a logarithmic scale, a line a form."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        groups: dict[str, list[Any]] = {}
        for row in rows[1:]:
            label = row["kind"] + (", with a warm-up" if row.get("server_warmup") else "")
            label += ", plan auto" if row.get("granularity") == "auto" else ""
            groups.setdefault(label, []).append((row["bytes"], shares(row, rows[0])))
        for place, (label, unsorted) in enumerate(groups.items()):
            colour, style, marker = COLOURS[place % len(COLOURS)], *STYLES[place // len(COLOURS)]
            points = sorted(unsorted)
            sizes = [size for size, _ in points]
            means, least, most = ([100 * of(reached) for _, reached in points] for of in (fmean, min, max))
            axes.plot(
                sizes, means, style, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label
            )
            axes.fill_between(sizes, least, most, color=colour, alpha=0.15)
        axes.axhline(100, linestyle=":", color=INK, linewidth=1)
        ticks = octaves([size for points in groups.values() for size, _ in points])
        axes.set(
            xscale="log",
            xlabel="bytes of coordinates and scales, a client and round",
            ylabel="share of FedAvg's loss reduction, %",
        )
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        figure.savefig(folder / f"quality-{name}.png", dpi=150)
        figure.savefig(folder / f"quality-{name}.svg", metadata={"Date": None})


def octaves(sizes: Sequence[int]) -> list[int]:
    """Powers of two from the one below all sizes to the one above."""
    return [1 << n for n in range(min(sizes).bit_length() - 1, (max(sizes) - 1).bit_length() + 1)]


def read(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of the results' files, by their name without what comes before a dash."""
    return {
        path.stem.removeprefix("quality-"): json.loads(path.read_text("utf-8"))["rows"]
        for path in sorted(RESULTS.glob(pattern))
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the files say")
    check = parser.parse_args().check
    runs = read("quality-*.json")
    del runs["phases"]
    errors, plans, rounds = runs.pop("errors"), read("plans.json")["plans"], read("rounds.json")["rounds"]
    phases = json.loads((RESULTS / "quality-phases.json").read_text("utf-8"))
    text = page(errors, runs, plans, rounds, phases)
    if check:
        return int((DOCS / "quality.md").read_text("utf-8") != text)
    (DOCS / "quality.md").write_text(text, "utf-8")
    for name, rows in runs.items():
        save_plot(name, rows, DOCS / "images")
    save_rounds_plot(rounds, DOCS / "images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
