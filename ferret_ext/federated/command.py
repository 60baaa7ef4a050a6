"""What a subcommand of `ferret` is, and what all of them share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ferret_ext.federated import config as configuration
from ferret_ext.federated import presets
from ferret_ext.federated.presets import PRESETS
from ferret_ext.federated.settings import Leaf, Setting, expected, read_override, read_yaml

if TYPE_CHECKING:
    from rich.console import Console

    from ferret_ext.federated.config import SimulationConfig
    from ferret_ext.federated.report import RunFolder
    from ferret_ext.federated.run import Narrator, OpenJournal, Result

    Play = Callable[[SimulationConfig, Narrator, OpenJournal], Result]

PLAIN_WIDTH = 100  # of tables where the output is no terminal


@dataclass(frozen=True)
class Command:
    """A subcommand. `run` returns the exit status, or raises what `explain` turns into one."""

    summary: str
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]


def make_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"ferret {command}",
        description=textwrap.fill(description),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    return parser


def make_console(plain_width: int = PLAIN_WIDTH) -> Console:
    """The terminal, or plain lines of a fixed width; without bars and warnings of transformers in between."""
    import transformers
    from rich.console import Console

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console()
    console.on_broken_pipe = _pass_on  # type: ignore[method-assign]
    if not console.is_terminal:
        console.width = plain_width
    return console


def _pass_on() -> None:
    """Rich would end with the status 1, which has a meaning here."""
    raise BrokenPipeError


def settings_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a command that takes settings."""
    wins = (
        "Settings come from the preset, then the YAML file, then the flags, then key=value; the later wins."
    )
    return make_parser(command, f"{description} {wins}", examples)


def add_settings(parser: argparse.ArgumentParser, leaves: Sequence[Leaf]) -> None:
    """A flag for every setting; `key=value` says the same and wins over a flag."""
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file of settings, e.g. a run's config.yaml"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace former results in --out")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, e.g. rounds=5 ferret.K=4096"
    )
    for leaf in leaves:
        name = leaf.key.rpartition(".")[2]
        default = "none" if leaf.default in (None, ()) else leaf.default
        default = f"; default {default}" if default != "" else ""
        help_text = f"{leaf.help} ({expected(leaf)}{default})".replace("%", "%%")
        flags = dict.fromkeys([f"--{leaf.key}", f"--{leaf.key.replace('_', '-')}"])
        parser.add_argument(*flags, dest=leaf.key, metavar=name.upper(), default=None, help=help_text)


def read_settings(
    options: argparse.Namespace, not_from_file: Collection[str] = (), with_preset: bool = True
) -> list[Setting]:
    """What preset, file, flags and overrides say, in this order. Raises ConfigError."""
    settings: list[Setting] = []
    if options.config:
        settings += [(key, value) for key, value in read_yaml(options.config) if key not in not_from_file]
    flags = vars(options)
    keys = (leaf.key for leaf in configuration.leaves())
    settings += [(key, flags[key]) for key in keys if flags.get(key) is not None]
    settings += map(read_override, options.overrides)
    if options.preset and with_preset:
        return [*presets.settings_of(options.preset, presets.variant_of(settings)), *settings]
    return settings


def with_saved(options: argparse.Namespace, settings: list[Setting]) -> list[Setting]:
    """The settings, after those of the run that is resumed where only its folder is given."""
    given = dict(settings)
    saved = Path(str(given.get("out", ""))).expanduser() / "config.yaml"
    if options.resume and not options.preset and given.keys() == {"out"} and saved.is_file():
        return [*read_yaml(saved), *settings]
    return settings


def perform(console: Console, config: SimulationConfig, folder: RunFolder, play: Play) -> None:
    """A run from where its folder stands to its end: what it says, what it leaves, and its table."""
    from ferret_ext.federated.console import Narration, show_table

    if folder.finished and folder.begun:
        console.print(f"finished before: {folder.path}", markup=False, highlight=False, soft_wrap=True)
        return
    with Narration(console, folder, config.rounds) as narration:
        if folder.begun:
            narration.say(f"going on with the run in {folder.path}")
        result = play(config, narration, folder.open_journal)
    folder.finish(result.model, result.tokenizer, result.history)
    show_table(console, result.history)
    console.print(f"results: {folder.path}", markup=False, highlight=False, soft_wrap=True)
