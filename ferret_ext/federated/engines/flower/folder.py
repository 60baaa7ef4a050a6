"""A Flower app in a folder: a run's settings as its configuration, and two files of a line each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.settings import ConfigError

PATHS = (("model",), ("data",), ("dataset", "labels_file"), ("dataset", "task_lists"))
FILES = ("pyproject.toml", "server_app.py", "client_app.py")

SERVER_APP = '''"""The server's side: the rounds of a run, whose settings are in pyproject.toml."""

from ferret_ext.federated.engines.flower.link import server_app

app = server_app()
'''
CLIENT_APP = '''"""A client's side: calls go to the worker at the node's socket (see `ferret join`)."""

from ferret_link.client_app import app

__all__ = ["app"]
'''
SIMULATED_CLIENT_APP = '''"""All clients' side, in Flower's simulation: they take turns in its processes."""

from ferret_ext.federated.engines.flower.simulation import client_app

app = client_app()
'''
PROJECT = """# Made by ferret flower-init. Start it with `flwr run`, whose --run-config sets what is below.
[project]
name = "ferret-run"
version = "1.0.0"
description = "Federated tuning by ferret_ext"
license = "Apache-2.0"
dependencies = []  # ferret-ext[flower] is installed beforehand, on the server and at every client

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

"""


def write(
    folder: Path, config: SimulationConfig, overwrite: bool = False, *, simulation: bool = False
) -> None:
    """Writes the app. simulation: for Flower's, where clients need no workers of their own.

    Paths become absolute where they are there: a ServerApp's working directory is its SuperLink's. Raises
    ConfigError.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"folder: expected a folder, got {str(folder)!r}, which is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"folder: expected a new or empty one, got {str(folder)!r}; --overwrite")
    client_app = SIMULATED_CLIENT_APP if simulation else CLIENT_APP
    texts = (PROJECT + settings_as_toml(config), SERVER_APP, client_app)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, texts, strict=True):
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"folder: expected one that can be written, got: {error}") from None


def settings_as_toml(config: SimulationConfig) -> str:
    """All settings, since `flwr run --run-config` overrides only what is there; none is the text "none"."""
    settings = dataclasses.asdict(config)
    settings["out"] = str(Path(config.out).expanduser().absolute())
    for *section, name in PATHS:
        place = settings[section[0]] if section else settings
        if place[name] and Path(place[name]).expanduser().exists():
            place[name] = str(Path(place[name]).expanduser().absolute())
    lines, sections = ["[tool.flwr.app.config]"], []
    for name, value in settings.items():
        if isinstance(value, dict):
            sections += ["", f"[tool.flwr.app.config.{name}]", *(_line(*item) for item in value.items())]
        else:
            lines.append(_line(name, value))
    return "\n".join([*lines, *sections]) + "\n"


def _line(name: str, value: Any) -> str:
    if value is None or value == ():
        value = "none"
    if isinstance(value, tuple):
        value = ",".join(value)
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{name} = {text}"  # JSON's numbers, booleans and strings are TOML's
