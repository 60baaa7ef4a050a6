"""What a subcommand of `ferret` is, and what all of them share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

UNWELL = 1
REFUSED = 2
INTERRUPTED = 130
PLAIN_WIDTH = 100  # of tables where the output is no terminal


@dataclass(frozen=True)
class Command:
    """A subcommand. `run` returns the exit status, and raises ConfigError, DataError or DivergedError."""

    summary: str
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]


def make_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"ferret {command}",
        description=textwrap.fill(description),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def make_console(plain_width: int = PLAIN_WIDTH) -> Console:
    """The terminal, or plain lines of a fixed width; without bars and warnings of transformers in between."""
    import transformers
    from rich.console import Console

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console()
    if not console.is_terminal:
        console.width = plain_width
    return console
