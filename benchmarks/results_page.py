"""docs/results.md and its pictures, from the comparisons kept as JSON.

    python benchmarks/results_page.py [--check]

Every benchmarks/results/compare-NAME.json is the comparison.json of `ferret compare --preset small/NAME`.
--check writes nothing, and fails if the page is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ferret_ext.federated.compare import Row, markdown
from ferret_ext.federated.plot_comparison import save_comparison_plot

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"

TITLES = {
    "gsm8k": "GSM8K: grade-school word problems, 3 clients, evenly",
    "codealpaca": "CodeAlpaca: a programming language a client",
    "dolly": "Dolly-15K: 40 clients, skewed by category",
    "ni": "Natural Instructions: a task a client",
}

# Rouge-L in per cent, arXiv 2409.06277, tables 1 and 2.
PAPER = {
    "ni": {"columns": ("NI 1.3B", "NI 3B"), "rows": {
        "fedptuning": (19.61, 25.41), "fedprompt": (6.04, 8.95), "fedit-sgd": (19.40, 28.14),
        "fedit": (22.30, 28.13), "fedzo": (21.74, 29.46), "fedkseed": (22.33, 29.77),
        "fedavg": (23.95, 32.11), "ferret": (24.99, 30.03)}},
    "dolly": {"columns": ("Dolly 1.3B", "Dolly 3B"), "rows": {
        "fedptuning": (23.98, 30.30), "fedprompt": (32.73, 24.50), "fedit-sgd": (27.23, 29.28),
        "fedit": (30.80, 33.23), "fedzo": (26.99, 31.67), "fedkseed": (30.91, 34.56),
        "fedavg": (29.67, 30.98), "ferret": (30.63, 34.57)}},
    "codealpaca": {"columns": ("CodeAlpaca 7B", "CodeAlpaca 13B"), "rows": {
        "fedit": (4.66, 6.10), "fedzo": (4.58, 6.19), "fedkseed": (8.33, 10.70),
        "fedavg": (15.41, 14.68), "ferret": (12.10, 11.84)}},
    "gsm8k": {"columns": ("GSM8K 7B", "GSM8K 13B"), "rows": {
        "fedit": (30.31, 13.46), "fedzo": (30.41, 13.63), "fedkseed": (28.26, 33.67),
        "fedavg": (38.30, 39.82), "ferret": (36.10, 34.50)}},
}  # fmt: skip

HEAD = """# Results

Written by `python benchmarks/results_page.py` from `benchmarks/results/compare-*.json`, which come from
`ferret compare`.

Every algorithm starts from the same model and meets the same clients, order of data and evaluation. Loss is
the mean cross-entropy in nats of held-out responses after the last round, spread its least and largest over
the seeds. Seconds and bytes are a client's of one round, measured on the messages; "aggregate" is the
server's work and a replica's rebuilding. Target losses are half way, on a logarithmic scale, between the
first model's and the best final one.

**What may be compared.** The model here has 260,000 parameters and knows children's stories, so its losses
say nothing about the paper's models of 1.3 to 13 billion parameters, and its Rouge-L is noise. What carries
over is the order of the algorithms at equal rounds, the bytes, and the shares of time; the paper's own
figures stand below each table for that. Step sizes were chosen by short trials on GSM8K, and FedZO's and
FedKSeed's on Natural Instructions and Dolly again, where that of GSM8K diverged or went to and fro. FedZO and
FedKSeed take 200 local steps a round as published, DeComFL and FeedSign one of ten directions, the others 10
steps of 4 records. Seconds were taken while the machine did other work too, on one core. Bytes on GSM8K and
CodeAlpaca are of wire format 2, whose messages are some 14 bytes shorter than today's for Ferret, and some
hundreds longer for algorithms that send tensors. Ferret sends float32 coordinates here, as published but for
their width; [quality.md](quality.md) has what fewer bits buy.
The pictures end where a loss is 1.25 times the first.
"""


def page(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown; comparisons are keyed by the presets' names, without "small/"."""
    known = {name: comparisons[name] for name in TITLES if name in comparisons}
    return HEAD + overview(known) + "".join(section(name, known[name]) for name in known)


def rows_of(comparison: Mapping[str, Any]) -> list[Row]:
    """The comparison's rows, the least loss first."""
    return sorted((Row(**row) for row in comparison["rows"]), key=lambda row: row.loss)


def overview(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    """Final losses of all data sets side by side, in the order of the first."""
    losses = {name: {row.variant: row.loss for row in rows_of(it)} for name, it in comparisons.items()}
    variants = dict.fromkeys(variant for of_one in losses.values() for variant in of_one)
    lines = [["loss after 10 rounds", *losses], ["---", *["---:"] * len(losses)]]
    for variant in variants:
        found = (of_one.get(variant) for of_one in losses.values())
        lines.append([variant, *("not run" if loss is None else f"{loss:.3f}" for loss in found)])
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def section(name: str, comparison: Mapping[str, Any]) -> str:
    rows = rows_of(comparison)
    found = "".join(f"- {line}\n" for line in findings(rows))
    return f"""
## {TITLES[name]}

{setting(name, comparison["runs"])}

{markdown(rows, comparison["target_loss"])}
{found}
![Loss against rounds, bytes and seconds](images/compare-{name}.svg)

The paper's Rouge-L in per cent:

{paper_table(name)}"""


def setting(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """How the figures came about."""
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    about, rounds = [run["environment"] for run in runs], len(runs[0]["rounds"]) - 1
    processors, torch = (", ".join(sorted({it[key] for it in about})) for key in ("processor", "torch"))
    return (
        f"`ferret compare --preset small/{name}` with {runs[0]['model']}, {rounds} rounds, seeds {seeds}; "
        f"{processors}, threads: {about[0]['threads']}, torch {torch}."
    )


def findings(rows: Sequence[Row]) -> list[str]:
    """Ferret beside FedAvg and the zeroth-order algorithms, in words."""
    by_name = {row.variant: row for row in rows}
    lines: list[str] = []
    if (ferret := by_name.get("ferret")) is None:
        return lines
    share = (ferret.seconds_project + ferret.seconds_aggregate) / ferret.seconds_local
    lines.append(f"Ferret's projection and aggregation take {share:.2%} of its local training.")
    if (fedavg := by_name.get("fedavg")) is not None:
        lines.append(
            f"FedAvg sends {fedavg.bytes_up / ferret.bytes_up:,.0f} times as many bytes as Ferret, and ends "
            f"at {fedavg.loss:.3f} where Ferret ends at {ferret.loss:.3f}."
        )
    for name in ("fedkseed", "fedzo"):
        if (other := by_name.get(name)) is not None:
            lines.append(f"{name} ends at {other.loss:.3f}, {_sooner(ferret, other)}.")
    return lines


def _sooner(ferret: Row, other: Row) -> str:
    if ferret.to_target is None:
        return "and Ferret does not reach the target loss"
    if other.to_target is None:
        return f"never at the target loss that Ferret reaches after {ferret.to_target:.3g} rounds"
    return f"and needs {other.to_target:.3g} rounds to the target loss, Ferret {ferret.to_target:.3g}"


def paper_table(name: str) -> str:
    columns, rows = PAPER[name]["columns"], PAPER[name]["rows"]
    assert isinstance(rows, dict)
    lines = [["algorithm", *columns], ["---", "---:", "---:"]]
    lines += [[variant, *(f"{score:.2f}" for score in scores)] for variant, scores in rows.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read() -> dict[str, dict[str, Any]]:
    paths = RESULTS.glob("compare-*.json")
    return {path.stem.removeprefix("compare-"): json.loads(path.read_text("utf-8")) for path in paths}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the files say")
    check = parser.parse_args().check
    comparisons = read()
    text = page(comparisons)
    if check:
        return int((DOCS / "results.md").read_text("utf-8") != text)
    (DOCS / "results.md").write_text(text, "utf-8")
    for name, comparison in comparisons.items():
        with tempfile.TemporaryDirectory() as folder:
            save_comparison_plot(comparison["runs"], Path(folder))
            for suffix in ("svg", "png"):
                shutil.copy(
                    Path(folder) / f"comparison.{suffix}", DOCS / "images" / f"compare-{name}.{suffix}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
