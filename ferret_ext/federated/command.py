"""What a subcommand of `ferret` is, and what all of them share."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_type_hints

from ferret_ext.federated import config as configuration
from ferret_ext.federated import presets
from ferret_ext.federated.explain import REFUSED
from ferret_ext.federated.presets import PRESETS
from ferret_ext.federated.settings import (
    Leaf,
    Setting,
    closest,
    expected,
    nearest,
    read_override,
    read_yaml,
)

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


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows each flag once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        every = action.option_strings
        action.option_strings = spelled_once(every)
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = every


def spelled_once(flags: Sequence[str]) -> list[str]:
    """The flags without --num-clients where --num_clients is among them."""
    others = {_hyphenated(flag) for flag in flags if "_" in flag}
    return [flag for flag in flags if flag not in others]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with what was probably meant, and not all that could be typed."""

    def error(self, message: str) -> NoReturn:
        text = message.replace("argument ", "", 1) if message.startswith("argument ") else message
        text = re.sub(r", key=value$", "", text)  # nothing has to be there
        print(f"{self.prog}: error: {text}{self._meant(text)}; {self.prog} --help explains", file=sys.stderr)
        raise SystemExit(REFUSED)

    def _meant(self, message: str) -> str:
        """What is near to the first word that is not understood."""
        if unknown := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            flags = [it.removeprefix("--") for action in self._actions for it in action.option_strings]
            near = [f"--{flag}" for flag in nearest(unknown[1], flags)]
        elif unknown := re.search("invalid choice: '([^']*)'", message):
            near = closest(unknown[1], [str(it) for action in self._actions for it in action.choices or ()])
        else:
            near = []
        return f"; did you mean {' or '.join(near)}?" if near else ""


def make_parser(command: str, description: str, examples: str, usage: str | None = None) -> Parser:
    parser = Parser(
        prog=f"ferret {command}",
        usage=usage and f"ferret {command} {usage}",
        description=textwrap.fill(description, 80),
        epilog=examples,
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    return parser


def numbers(text: str) -> list[int]:
    """Different numbers >= 0, with commas between them."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or len({*found}) < len(found) or not all(map(str.isdecimal, found)):
        raise argparse.ArgumentTypeError(f"expected different numbers, e.g. 0 or 0,1,2, got {text!r}")
    return [int(name) for name in found]


def make_console(plain_width: int = PLAIN_WIDTH) -> Console:
    """The terminal, or plain lines of a fixed width; without bars and warnings of transformers in between,
    and without the hub's retries, which take half a minute of lines where there is no network."""
    import huggingface_hub
    import transformers
    from rich.console import Console

    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
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


def settings_parser(command: str, description: str, examples: str, usage: str = "") -> Parser:
    """The parser of a command that takes settings. usage: what stands before them."""
    wins = (
        "Settings come from the preset, then the YAML file, then the flags, then key=value; the later wins."
    )
    settings = "[--preset NAME] [--config FILE] [--SETTING VALUE ..] [key=value ..]"
    return make_parser(command, f"{description} {wins}", examples, f"{usage} {settings}".strip())


def add_settings(parser: argparse.ArgumentParser, leaves: Sequence[Leaf]) -> None:
    """A flag for every setting; `key=value` says the same and wins over a flag."""
    names = ", ".join(sorted(PRESETS))
    parser.add_argument(
        "--preset", metavar="NAME", choices=sorted(PRESETS), help=f"settings to start from: {names}"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file of settings, e.g. a run's config.yaml"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace former results in --out")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, e.g. rounds=5 ferret.K=4096"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for leaf in leaves:
        section, _, name = leaf.key.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(*_heading(section))
        groups[section].add_argument(
            *dict.fromkeys([f"--{leaf.key}", _hyphenated(f"--{leaf.key}")]),
            dest=leaf.key,
            metavar=name.upper(),
            default=None,
            help=_help(leaf),
        )


def _hyphenated(flag: str) -> str:
    return flag.replace("_", "-")


def _heading(section: str) -> tuple[str, str | None]:
    """A section's title in the help, and what it is about."""
    if not section:
        return "settings (- may stand for _ in all flags)", None
    about = get_type_hints(configuration.SimulationConfig)[section].__doc__ or ""
    return f"settings {section}.*", about.partition("\n\n")[0]


def _help(leaf: Leaf) -> str:
    default = "none" if leaf.default in (None, ()) else str(leaf.default)
    default = default.lower() if isinstance(leaf.default, bool) else default
    said = f"; default {default}" if default else ""
    return f"{leaf.help} ({expected(leaf)}{said})".replace("%", "%%")


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
