"""The commands of `ferret` that look at things: doctor, inspect, plot, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ferret_ext.federated.command import Command, make_console, make_parser
from ferret_ext.federated.explain import UNWELL
from ferret_ext.federated.settings import ConfigError

DOCTOR_EXAMPLES = """examples:
  ferret doctor
  ferret doctor --model FOLDER_OR_HUB_NAME --out runs/
  ferret doctor --listen :9092                    # on the server
  ferret doctor --connect server.example:9092     # on a client
"""
INSPECT_EXAMPLES = """examples:
  ferret inspect runs/gsm8k
  ferret inspect runs/gsm8k/ledger
  ferret inspect update.bin plan.json
"""
PLOT_EXAMPLES = """examples:
  ferret plot runs/gsm8k
  ferret plot runs/gsm8k runs/second --out pictures/
"""
REPORT_EXAMPLES = """examples:
  ferret report runs/gsm8k
  ferret report runs/comparison runs/second
"""


def doctor_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "doctor",
        "Looks at this machine: versions, processor, GPUs, whether every device gives the streams' known "
        "answers, and on request room for a model and the network. A line each says ok, warning or fails; "
        f"the exit status is {UNWELL} if something fails.",
        DOCTOR_EXAMPLES,
    )
    parser.add_argument("--model", help="folder or hub name: is there memory and disk to tune it?")
    parser.add_argument("--out", type=Path, default=Path(), help="where runs would be; default here")
    parser.add_argument("--listen", metavar="HOST:PORT", help="could a server listen here?")
    parser.add_argument("--connect", metavar="HOST:PORT", help="can a server be reached there?")
    return parser


def inspect_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "inspect",
        "Says what a file or folder is and holds: a run's folder, a ledger, a message of the wire format or "
        "a block plan as JSON. A ledger's records are checked for their place on the way.",
        INSPECT_EXAMPLES,
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path)
    return parser


def plot_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plot",
        "Draws runs, as PNG and SVG: loss against rounds, bytes and seconds; the time of a round by phase; "
        "who holds what; of Ferret's runs, how many coordinates each block has. A run under way is drawn as "
        "far as it is.",
        PLOT_EXAMPLES,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, help="folder for the pictures; default RUN/plots of a single run")
    return parser


def report_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "report",
        "Writes report.html into the folder of a run or a comparison: one page with its pictures, tables, "
        "settings and environment, which needs no other file and no network. Finished runs have one already; "
        "of a run under way it tells what is there.",
        REPORT_EXAMPLES,
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="of a run or a comparison")
    return parser


def run_inspection(options: argparse.Namespace) -> int:
    """Lines on each path."""
    from ferret_ext.federated import inspection
    from ferret_ext.federated.console import Lines

    lines = Lines(make_console())
    for path in options.paths:
        for line in inspection.describe(path):
            lines.say(line)
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """A line a finding."""
    from ferret_ext.federated import doctor
    from ferret_ext.federated.console import Lines

    lines, fails = Lines(make_console()), False
    for finding in doctor.examine(options.model, options.out, options.listen, options.connect):
        lines.say(str(finding))
        fails = fails or finding.verdict == "fails"
    return UNWELL if fails else 0


def run_plot(options: argparse.Namespace) -> int:
    """The pictures of all runs."""
    from ferret_ext.federated import plot_runs
    from ferret_ext.federated.console import Lines

    if options.out is None and len(options.runs) > 1:
        raise ConfigError("out: expected a folder for the pictures of several runs, got none; give --out")
    out = options.out or options.runs[0] / "plots"
    names, notes = plot_runs.save_plots(options.runs, out)
    Lines(make_console()).say("\n".join([*(f"{out / name}.png, .svg" for name in names), *notes]))
    return 0


def run_report(options: argparse.Namespace) -> int:
    """A page for each folder."""
    from ferret_ext.federated import page
    from ferret_ext.federated.console import Lines

    lines = Lines(make_console())
    for folder in options.folders:
        lines.say(str(page.write(folder)))
    return 0


COMMANDS = {
    "plot": Command("draw runs", plot_parser, run_plot),
    "report": Command("write one page about a run or a comparison", report_parser, run_report),
    "inspect": Command(
        "say what a run's folder, ledger, message or plan holds", inspect_parser, run_inspection
    ),
    "doctor": Command("look at this machine and its devices", doctor_parser, run_doctor),
}
