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
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.plot import save_plot
from ferret_ext.federated.plot_partition import save_partition_plot

FILES = (
    "config.yaml",
    "metrics.jsonl",
    "plot.png",
    "plot.svg",
    "partition.json",
    "partition.png",
    "partition.svg",
)


class RunFolder:
    """The folder of one run: the files in FILES, and model/."""

    def __init__(self, config: SimulationConfig, overwrite: bool = False) -> None:
        """Checks the folder `config.out`, and changes nothing before the run's first metrics are there.

        An existing folder with something in it is refused unless `overwrite`, which removes the results of a
        former run and nothing else. Raises ConfigError.
        """
        self.path = Path(config.out).expanduser()
        self.metrics = self.path / "metrics.jsonl"
        self.begun = False
        self.holdings: Holdings | None = None  # who holds what, written when the folder begins
        self._config = config
        with self._writing():
            self._check(overwrite)

    def begin(self) -> None:
        """Removes the results of a former run, makes the folder, writes config.yaml and who holds what.

        Raises ConfigError.
        """
        with self._writing():
            self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            self._config.save(self.path / "config.yaml")
            if self.holdings is not None:
                self._write_partition(self.holdings)
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

    def _write_partition(self, holdings: Holdings) -> None:
        text = json.dumps(holdings.as_dict(), indent=1, ensure_ascii=False)
        (self.path / "partition.json").write_text(text + "\n", "utf-8")
        save_partition_plot(holdings, self.path)

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
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
