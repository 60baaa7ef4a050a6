"""`ferret completion`: what a shell needs to complete commands, flags and their values at the Tab key."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from ferret_ext.federated import config as configuration
from ferret_ext.federated.command import Command, make_parser, spelled_once

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """examples:
  ferret completion bash > ~/.local/share/bash-completion/completions/ferret
  ferret completion zsh > ~/.zfunc/_ferret     # with fpath+=~/.zfunc before compinit in ~/.zshrc
  ferret completion fish > ~/.config/fish/completions/ferret.fish
"""


def completion_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "completion", "Prints a script that completes ferret's commands and flags.", EXAMPLES
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def command(commands: Mapping[str, Command]) -> Command:
    """The command, for `commands` as they are when it runs."""

    def run(options: argparse.Namespace) -> int:
        import shtab

        print(shtab.complete(_whole(commands), shell=options.shell))
        return 0

    return Command("print a script for completion in a shell", completion_parser, run)


def _whole(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """One parser of all commands, with the values that their flags take."""
    import shtab

    whole = argparse.ArgumentParser(prog="ferret")
    each = whole.add_subparsers(dest="command")
    values = {
        leaf.key: get_args(leaf.hint) for leaf in configuration.leaves() if get_origin(leaf.hint) is Literal
    }
    for name, it in commands.items():
        parser = it.parser()
        for action in parser._actions:
            action.option_strings = spelled_once(action.option_strings)
            action.choices = action.choices or values.get(action.dest)
            if action.type is Path or action.dest in ("out", "model", "data"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        each.add_parser(name, parents=[parser], add_help=False, help=it.summary)
    return whole
