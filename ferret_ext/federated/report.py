"""What a run leaves behind: a folder with its config, metrics, plot and model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferret_ext.federated.config import ConfigError, SimulationConfig
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.plot import save_plot


class RunFolder:
    """The folder of one run: config.yaml, metrics.jsonl, plot.png, plot.svg, model/."""

    def __init__(self, config: SimulationConfig, overwrite: bool = False) -> None:
        """Makes the folder `config.out` and writes config.yaml.

        An existing folder with something in it is refused unless `overwrite`, which removes the results of a
        former run and nothing else. Raises ConfigError.
        """
        self.path = Path(config.out).expanduser()
        self._metrics = self.path / "metrics.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: expected a folder, got {config.out!r}, which is a file")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"out: expected a new or empty folder, got {config.out!r}; --overwrite replaces it"
                )
            self._clear()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            config.save(self.path / "config.yaml")
        except OSError as error:
            raise ConfigError(
                f"out: expected a folder that can be written, got {config.out!r}: {error}"
            ) from None

    def append(self, metrics: RoundMetrics) -> None:
        """Adds a round to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")

    def finish(self, model: Any, tokenizer: Any, history: Sequence[RoundMetrics]) -> None:
        """Writes the plot, and the global model as a folder for transformers."""
        save_plot(history, self.path)
        model.save_pretrained(self.path / "model")
        tokenizer.save_pretrained(self.path / "model")

    def _clear(self) -> None:
        shutil.rmtree(self.path / "model", ignore_errors=True)
        for name in ("config.yaml", "metrics.jsonl", "plot.png", "plot.svg"):
            (self.path / name).unlink(missing_ok=True)
