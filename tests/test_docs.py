"""Documents: their Python runs, and the commands, settings, files and links that they name exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferret_ext.federated import config as configuration
from ferret_ext.federated import settings
from ferret_ext.federated.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]
FILES = ("json", "jsonl", "head", "png", "svg", "py", "md", "yaml")  # partition.json is no setting
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text("utf-8")) if kind == language]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each line that begins with `ferret`; a line that ends in a backslash goes on."""
    for block in code(path, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if (typed := line.removeprefix("$ ")).startswith("ferret "):
                words = shlex.split(typed, comments=True)
                yield words[1 : words.index(">") if ">" in words else None]


@pytest.mark.parametrize("path", [path for path in PAGES if code(path, "python")], ids=name)
def test_python_runs(path: Path) -> None:
    """The blocks of a page one after the other, as a reader would."""
    exec(compile("\n".join(code(path, "python")), name(path), "exec"), {"__name__": "__page__"})


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if any(commands(path))], ids=name)
def test_commands_are_understood(path: Path) -> None:
    known = {leaf.key for leaf in configuration.leaves()}
    for command, *words in commands(path):
        given = [word for word in words if word != "..."]
        if "--help" in given:
            continue
        options = vars(COMMANDS[command].parser().parse_intermixed_args(given))
        flags = [(key, str(value)) for key, value in options.items() if key in known and value is not None]
        pairs = map(settings.read_override, options.get("overrides", ()))
        settings.fill(configuration.SimulationConfig, [*flags, *pairs])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_settings_and_files_exist(path: Path) -> None:
    """`section.setting` in code is a setting, and `folder/file` of the repository is there."""
    text = re.sub(BLOCK, "", path.read_text("utf-8"))
    keys = {leaf.key for leaf in configuration.leaves()}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for section, setting in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", text):
        if section in sections and setting not in FILES:
            assert f"{section}.{setting}" in keys
    for file in re.findall(
        r"`((?:docs|tests|csrc|benchmarks|ferret_ext|python_examples)/[\w./-]+\.\w+)`", text
    ):
        assert "NAME" in file or (ROOT / file).exists(), file


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target
