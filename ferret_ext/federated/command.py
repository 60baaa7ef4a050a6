"""What a subcommand of `ferret` is, and what all of them share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

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
