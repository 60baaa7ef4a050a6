"""`ferret report`: one HTML page of a run or a comparison, which needs no other file and no network.

What it shows may come from strangers: names of clients, reasons, folders. All of it is text to the template,
which escapes it, and the page itself forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ferret_ext import __version__
from ferret_ext.federated import files
from ferret_ext.federated.settings import ConfigError

if TYPE_CHECKING:
    from markupsafe import Markup

PAGE = "report.html"


@dataclass(frozen=True)
class Figure:
    """A number to begin with, and what to compare it with."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """words: leading columns of text; the others are numbers. folded: shown when asked for."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    summary: str
    figures: Sequence[Figure]
    pictures: Sequence[Picture]
    tables: Sequence[Table]


def write(folder: Path) -> Path:
    """Writes report.html into the folder of a run or a comparison; its path. Raises ConfigError."""
    text = render(read(folder))
    try:
        files.replace(folder / PAGE, lambda path: path.write_text(text, "utf-8"))
    except OSError as error:
        raise ConfigError(f"folder: expected one that can be written, got {str(folder)!r}: {error}") from None
    return folder / PAGE


def read(folder: Path) -> Page:
    """What the page of this folder says. Raises ConfigError."""
    from ferret_ext.federated import page_comparison, page_run
    from ferret_ext.federated.compare import COMPARISON

    if (folder / COMPARISON).is_file():
        return page_comparison.read(folder)
    if (folder / "metrics.jsonl").is_file():
        return page_run.read(folder)
    raise ConfigError(f"folder: expected one of a run or a comparison, got {str(folder)!r}")


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ferret_ext.federated")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(page=page, version=__version__)
