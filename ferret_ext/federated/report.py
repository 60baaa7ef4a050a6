"""What a run leaves behind: a folder with its config, metrics, plot and model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ferret_ext.federated import adapters
from ferret_ext.federated.config import ConfigError, SimulationConfig
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.plot import save_plot


class RunFolder:
    """The folder of one run: config.yaml, metrics.jsonl, plot.png, plot.svg, model/."""

    def __init__(self, config: SimulationConfig, overwrite: bool = False) -> None:
        """Checks the folder `config.out`, and changes nothing before the run's first metrics are there.

        An existing folder with something in it is refused unless `overwrite`, which removes the results of a
        former run and nothing else. Raises ConfigError.
        """
        self.path = Path(config.out).expanduser()
        self.metrics = self.path / "metrics.jsonl"
        self.begun = False
        self._config = config
        with self._writing():
            self._check(overwrite)

    def begin(self) -> None:
        """Removes the results of a former run, makes the folder, writes config.yaml. Raises ConfigError."""
        with self._writing():
            self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            self._config.save(self.path / "config.yaml")
        self.begun = True

    def append(self, metrics: RoundMetrics) -> None:
        """Adds a round to metrics.jsonl; the first one begins the folder."""
        if not self.begun:
            self.begin()
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(metrics), allow_nan=False) + "\n")

    def finish(self, model: Any, tokenizer: Any, history: Sequence[RoundMetrics]) -> None:
        """Writes the plot, and the global model as a folder for transformers (see `adapters.save`)."""
        save_plot(history, self.path)
        adapters.save(model, tokenizer, self.path / "model")

    def _check(self, overwrite: bool) -> None:
        out = self._config.out
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: expected a folder, got {out!r}, which is a file")
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise ConfigError(f"out: expected a new or empty folder, got {out!r}; --overwrite replaces it")
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(f"{nearest} is not writable")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"out: expected a folder that can be written, got {self._config.out!r}: {error}"
            ) from None

    def _clear(self) -> None:
        shutil.rmtree(self.path / "model", ignore_errors=True)
        for name in ("config.yaml", "metrics.jsonl", "plot.png", "plot.svg"):
            (self.path / name).unlink(missing_ok=True)
