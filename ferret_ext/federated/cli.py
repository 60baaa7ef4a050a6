"""The `ferret` command: `ferret simulate` runs federated Ferret in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ferret_ext import __version__
from ferret_ext.federated import config as configuration
from ferret_ext.federated.config import ConfigError, Setting, SimulationConfig
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.presets import PRESETS

REFUSED = 2
INTERRUPTED = 130
PLAIN_WIDTH = 100  # of the table where the output is no terminal

EXAMPLES = """examples:
  ferret simulate --preset demo --out runs/demo
  ferret simulate --preset gsm8k --model MODEL --data gsm8k/ --out runs/gsm8k rounds=20 ferret.K=8192
  ferret simulate --config run.yaml --out runs/second training.learning_rate=0.05
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for what the user can put right, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="ferret", description="Federated full-parameter tuning with kilobytes."
    )
    parser.add_argument("--version", action="version", version=f"ferret {__version__}")
    parser.add_argument("command", choices=["simulate"], help="simulate: run all clients in this process")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see ferret simulate --help")
    rest = parser.parse_args(arguments).arguments
    options = simulate_parser().parse_intermixed_args(rest)
    try:
        return run_simulation(read_config(options), options.overwrite)
    except (ConfigError, DataError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("ferret simulate: interrupted", file=sys.stderr)
        return INTERRUPTED


def simulate_parser() -> argparse.ArgumentParser:
    """A flag for every setting; `key=value` says the same and wins over a flag."""
    parser = argparse.ArgumentParser(
        prog="ferret simulate",
        description="Rounds of federated Ferret in this process. Settings come from the preset, then the "
        "YAML file, then the flags, then key=value; the later wins.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file of settings, e.g. a run's config.yaml"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results of a former run in --out"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, e.g. rounds=5 ferret.K=4096"
    )
    for leaf in configuration.leaves():
        name = leaf.key.rpartition(".")[2]
        default = f"; default {leaf.default}" if leaf.default != "" else ""
        help_text = f"{leaf.help} ({configuration.expected(leaf)}{default})".replace("%", "%%")
        flags = dict.fromkeys([f"--{leaf.key}", f"--{leaf.key.replace('_', '-')}"])
        parser.add_argument(*flags, dest=leaf.key, metavar=name.upper(), default=None, help=help_text)
    return parser


def read_config(options: argparse.Namespace) -> SimulationConfig:
    """The config that preset, file, flags and overrides add up to. Raises ConfigError."""
    settings: list[Setting] = []
    if options.preset:
        settings += configuration.flatten(PRESETS[options.preset])
    if options.config:
        settings += configuration.read_yaml(options.config)
    flags = vars(options)
    settings += [
        (leaf.key, flags[leaf.key]) for leaf in configuration.leaves() if flags[leaf.key] is not None
    ]
    settings += map(configuration.read_override, options.overrides)
    return configuration.build(settings)


def run_simulation(config: SimulationConfig, overwrite: bool) -> int:
    """One run from its folder to its table. Raises ConfigError and DataError."""
    from rich.console import Console

    from ferret_ext.federated.client import DivergedError
    from ferret_ext.federated.console import Narration, show_table
    from ferret_ext.federated.engines.in_process import simulate
    from ferret_ext.federated.report import RunFolder

    folder = RunFolder(config, overwrite)
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    _quieten()
    try:
        with Narration(console, folder, config.rounds) as narration:
            result = simulate(config, narration)
    except DivergedError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        if folder.begun:
            print(f"ferret simulate: {folder.metrics} holds the rounds so far", file=sys.stderr)
        raise
    folder.finish(result.model, result.tokenizer, result.history)
    show_table(console, result.history)
    console.print(f"results: {folder.path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _refuse(reason: str) -> int:
    print(f"ferret simulate: error: {reason}", file=sys.stderr)
    return REFUSED


def _quieten() -> None:
    """No bars and warnings of transformers between our own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
