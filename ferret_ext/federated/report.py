"""What a run leaves behind: a folder with its config, metrics, plot and model."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ferret_ext import __version__, cpu_capability
from ferret_ext.federated import adapters, files, journal, page, trackers
from ferret_ext.federated.client import OptimizerStates
from ferret_ext.federated.config import EVALUATION_SETTINGS, FREE_SETTINGS, SimulationConfig
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.evaluation import Evaluation, Sample
from ferret_ext.federated.journal import FolderJournal, Genesis
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.plot import save_plot
from ferret_ext.federated.plot_partition import save_partition_plot
from ferret_ext.federated.settings import ConfigError, flatten, read_yaml


class ResultFolder:
    """A folder for results, checked at once and changed only when the first result is there."""

    results: tuple[str, ...]  # files and folders that overwriting removes

    def __init__(self, config: SimulationConfig, overwrite: bool = False) -> None:
        """Checks the folder `config.out`.

        An existing folder with something in it is refused unless `overwrite`, which removes former results
        and nothing else. Raises ConfigError.
        """
        self.path = Path(config.out).expanduser()
        self.begun = False
        self._config = config
        with self.writing():
            self._check(overwrite)

    def begin(self) -> None:
        """Removes former results and makes the folder. Raises ConfigError."""
        with self.writing():
            for name in self.results:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name, ignore_errors=True)
                else:
                    (self.path / name).unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
        self.begun = True

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
    def writing(self) -> Iterator[None]:
        """Turns an error in writing into a ConfigError that names the folder."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"out: expected a folder that can be written, got {self._config.out!r}: {error}"
            ) from None


class RunFolder(ResultFolder):
    """The folder of one run: the config, the rounds' metrics and their plot, the partition, and model/.

    Where text was generated, also samples.jsonl: a line for each sample of each such round. What is needed to
    go on after a crash stands there too, see `journal`. config.yaml tells that a folder is a run's, so it is
    there as long as anything is: it is written first and replaced, never removed.
    """

    results = (
        *journal.FILES,
        *trackers.FILES,
        "metrics.jsonl",
        "samples.jsonl",
        "plot.png",
        "plot.svg",
        "partition.json",
        "partition.png",
        "partition.svg",
        "run.json",
        page.PAGE,
        "model",
        "plots",
    )
    holdings: Holdings | None = None  # who holds what, written when the folder begins

    def __init__(self, config: SimulationConfig, overwrite: bool = False, resume: bool = False) -> None:
        """resume: a run that the folder has part of goes on, if it is this one; if there is none, it begins.

        Raises ConfigError.
        """
        path = Path(config.out).expanduser()
        self._measured: list[RoundMetrics] | None = None
        self._trackers = trackers.Trackers(config, path)
        self._lacking: list[RoundMetrics] = []  # rounds that a tracker may lack
        resumed = resume and (path / journal.HEAD).exists()
        super().__init__(config, overwrite or resumed or (resume and (path / "config.yaml").exists()))
        if resumed:
            self._check_config()
            with self.writing():
                self._measured = self._repair()
            self._lacking = list(self._measured)
            self.begun = True

    @property
    def finished(self) -> bool:
        """Whether the whole of a run is there."""
        return (self.path / "run.json").exists()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def open_journal(self, genesis: Genesis, states: OptimizerStates) -> FolderJournal:
        """The run's journal, which goes on after the rounds that are measured."""
        return FolderJournal(self.path, genesis, self._config.ledger, states, self._measured)

    def _check_config(self) -> None:
        """Raises ConfigError unless the folder's run has the settings of this one."""
        settings = flatten(asdict(self._config))
        wanted = ((key, value) for key, value in settings if key.partition(".")[0] not in FREE_SETTINGS)
        if text := journal.other_settings(self.path, read_yaml(self.path / "config.yaml"), wanted):
            raise ConfigError(text)

    def _repair(self) -> list[RoundMetrics]:
        """The metrics of rounds 0, 1, .. as far as they are whole; what comes after them is removed."""
        measured = []
        for round_, row in enumerate(_rows(self.metrics)):
            try:
                measured.append(RoundMetrics.of_row(row))
            except (TypeError, ValueError, KeyError):
                break
            if measured[-1].round != round_:
                del measured[-1]
                break
        _rewrite(self.metrics, map(asdict, measured))
        samples = self.path / "samples.jsonl"
        if samples.exists():
            _rewrite(samples, (row for row in _rows(samples) if row["round"] < len(measured)))
        return measured

    def begin(self) -> None:
        """Also writes config.yaml and who holds what."""
        super().begin()
        with self.writing():
            self._config.save(self.path / "config.yaml")
            if self.holdings is not None:
                self._write_partition(self.holdings)

    def append(self, metrics: RoundMetrics, samples: Sequence[Sample] = ()) -> list[str]:
        """Adds a round to metrics.jsonl, its samples to samples.jsonl, and its numbers to the trackers.

        The first one begins the folder. Returns what trackers have to say. Raises ConfigError.
        """
        if not self.begun:
            self.begin()
        with self.writing():
            _append(self.path / "samples.jsonl", ({"round": metrics.round, **asdict(it)} for it in samples))
            _append(self.metrics, [asdict(metrics)])
        lacking, self._lacking = [*self._lacking, metrics], []
        return list(self._trackers.log(lacking))

    def stop(self) -> None:
        """Tells the trackers that the run has not come to its end."""
        self._trackers.close(finished=False)

    def finish(self, model: Any, tokenizer: Any, history: Sequence[RoundMetrics]) -> None:
        """Writes the plot, the global model as a folder for transformers (`adapters.save`), and the page."""
        with self.writing():
            save_plot(history, self.path)
            adapters.save(model, tokenizer, self.path / "model")
            about = {"peak_memory_bytes": peak_memory(), "environment": environment()}
            text = json.dumps(about, indent=1) + "\n"
            # last: what has it is finished
            files.replace(self.path / "run.json", lambda path: path.write_text(text, "utf-8"))
            (self.path / journal.PENDING).unlink(missing_ok=True)
        self._trackers.close(finished=True)
        page.write(self.path)

    def _write_partition(self, holdings: Holdings) -> None:
        text = json.dumps(holdings.as_dict(), indent=1, ensure_ascii=False)
        (self.path / "partition.json").write_text(text + "\n", "utf-8")
        save_partition_plot(holdings, self.path)


class EvaluationFolder(ResultFolder):
    """The folder of one model's evaluation: evaluation.json and, where text was generated, samples.jsonl."""

    results = ("evaluation.json", "samples.jsonl")

    def write(self, evaluation: Evaluation) -> None:
        self.begin()
        config = {key: value for key, value in asdict(self._config).items() if key in EVALUATION_SETTINGS}
        content = {"records": evaluation.records, "loss": evaluation.loss, "scores": evaluation.scores}
        text = json.dumps({**content, "config": config}, indent=2, allow_nan=False)
        (self.path / "evaluation.json").write_text(text + "\n", "utf-8")
        _append(self.path / "samples.jsonl", map(asdict, evaluation.samples))


class ModelFolder(ResultFolder):
    """The folder of a model for transformers."""

    results = (
        *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    )


def peak_memory() -> int:
    """Bytes that this process has held at most: on the GPU where one was used, else of resident memory."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, object]:
    """What figures depend on: processor, threads and versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "datasets", "numpy")}
    return {
        "ferret-ext": __version__,
        **versions,
        "python": platform.python_version(),
        "processor": processor(),
        "cpu path": cpu_capability()["isa"],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name, as well as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """A file's lines of JSON up to the first that is not whole."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not line.endswith(b"\n"):
            return
        yield row


def _rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = "".join(map(_line, rows))
    files.replace(path, lambda beside: beside.write_text(lines, "utf-8"))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line of JSON for each row; without rows the file is left as it is."""
    if lines := [_line(row) for row in rows]:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
