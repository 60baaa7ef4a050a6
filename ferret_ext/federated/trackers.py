"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, as `trackers` has it.

Each is an extra, imported where it is used. metrics.jsonl is what counts: a tracker that was behind when a
run stopped gets the rounds that it lacks when the run goes on, one that has a round does not get it twice,
and one that fails is said and left alone, while the run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ferret_ext.federated import files
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.settings import ConfigError, flatten, one_line

IDS = "trackers.json"  # by which a run that goes on finds itself again
FILES = (IDS, "tensorboard", "wandb", "mlflow.db", "mlflow")
PROJECT = "ferret"
Numbers = Mapping[str, float]


class Tracker(Protocol):
    """A run as one tracker has it. newest: the last round that it has, -1 for none. place: where to look."""

    newest: int
    place: str

    def log(self, round_: int, numbers: Numbers) -> None: ...

    def close(self, finished: bool) -> None: ...


class Trackers:
    """All that a run is told to. Nothing is opened before the first round is there."""

    def __init__(self, config: SimulationConfig, folder: Path) -> None:
        """Raises ConfigError where a tracker's package is not installed."""
        check_installed(config.trackers)
        self._config, self._folder = config, folder
        self._open: dict[str, Tracker] | None = None

    def log(self, history: Sequence[RoundMetrics]) -> Iterator[str]:
        """Has all trackers up to date with these rounds; lines on where they are, or what is wrong.

        Raises ConfigError where one cannot be opened.
        """
        if self._open is None:
            self._open = {name: self._opened(name) for name in self._config.trackers}
            yield from (f"{name}: {tracker.place}" for name, tracker in self._open.items())
        for name, tracker in list(self._open.items()):
            try:
                _catch_up(tracker, history)
            except Exception as error:  # of whatever network or disk the tracker works with
                del self._open[name]
                yield f"{name} is left alone from here: {one_line(error)}; metrics.jsonl has every round"

    def close(self, finished: bool) -> None:
        for tracker in (self._open or {}).values():
            with suppress(Exception):  # the run is over; what a tracker lacks is in metrics.jsonl
                tracker.close(finished)
        self._open = {}

    def _opened(self, name: str) -> Tracker:
        try:
            return OPENERS[name](self._config, self._folder)
        except Exception as error:
            raise ConfigError(f"trackers: {name} cannot be opened: {one_line(error)}") from error


def numbers_of(metrics: RoundMetrics) -> dict[str, float]:
    """A round's numbers under the names that trackers group by."""
    seconds = {
        f"seconds/{name.removeprefix('seconds_')}": value
        for name, value in vars(metrics).items()
        if name.startswith("seconds_")
    }
    optional = {"train/loss": metrics.train_loss, "privacy/epsilon": metrics.epsilon}
    return {
        "eval/loss": metrics.eval_loss,
        **{name: value for name, value in optional.items() if value is not None},
        **{f"eval/{name}": mean for name, mean in metrics.scores.items()},
        "bytes/up": metrics.payload_bytes_up,
        "bytes/down": metrics.payload_bytes_down,
        "clients/drawn": len(metrics.clients),
        "clients/left_out": len(metrics.left_out),
        "clients/rejected": len(metrics.rejected),
        **seconds,
    }


def _catch_up(tracker: Tracker, history: Sequence[RoundMetrics]) -> None:
    for metrics in history:
        if metrics.round > tracker.newest:
            tracker.log(metrics.round, numbers_of(metrics))
            tracker.newest = metrics.round


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, config: SimulationConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        self.place = f"tensorboard --logdir {path}"
        self.newest = _newest_event(path)
        self._writer: Any = SummaryWriter(str(path))
        if self.newest < 0:
            rows = "".join(f"| {key} | {value} |\n" for key, value in _settings(config).items())
            self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, round_: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


def _newest_event(path: Path) -> int:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    if not path.is_dir():
        return -1
    events = EventAccumulator(str(path), size_guidance={"scalars": 1}).Reload()
    known = "eval/loss" in events.Tags()["scalars"]
    return max(it.step for it in events.Scalars("eval/loss")) if known else -1


class WandB:
    """A run of Weights & Biases, its files in the run's folder; WANDB_MODE=offline sends nothing."""

    def __init__(self, config: SimulationConfig, folder: Path) -> None:
        import wandb

        self._ids, known = folder / IDS, _ids(folder).get("wandb", {})
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.absolute().name,
            id=known.get("id"),
            resume="allow" if known else None,
            dir=str(folder.absolute()),
            config=_settings(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.newest = int(known.get("newest", -1))
        offline = f"wandb sync {Path(self._run.dir).parent}"
        self.place = offline if self._run.offline else str(self._run.url)

    def log(self, round_: int, numbers: Numbers) -> None:
        self._run.log({"round": round_, **numbers}, step=round_)
        _remember(self._ids.parent, "wandb", {"id": self._run.id, "newest": round_})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of the server that MLFLOW_TRACKING_URI names, else of a database in the run's folder."""

    def __init__(self, config: SimulationConfig, folder: Path) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        local = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._id = _ids(folder).get("mlflow", {}).get("id")
        if self._id is None:
            experiment = self._experiment((folder / "mlflow").absolute() if uri == local else None)
            self._id = self._client.create_run(experiment, run_name=folder.absolute().name).info.run_id
            _remember(folder, "mlflow", {"id": self._id})
            for key, value in _settings(config).items():
                self._client.log_param(self._id, key, value)
        self._client.update_run(self._id, status="RUNNING")
        steps = [it.step for it in self._client.get_metric_history(self._id, "eval/loss")]
        self.newest = max(steps, default=-1)
        self.place = f"run {self._id} of {uri}"

    def log(self, round_: int, numbers: Numbers) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(name, float(value), now, round_) for name, value in numbers.items()]
        )

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _experiment(self, artifacts: Path | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifacts.as_uri() if artifacts else None))


OPENERS: dict[str, Callable[[SimulationConfig, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_installed(names: Iterable[str]) -> None:
    """Raises ConfigError where a tracker's package is not."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"trackers: {name}: expected the package {name}, got: {one_line(error)}; "
                f"in the source tree, pip install '.[{name}]'"
            ) from None


def _settings(config: SimulationConfig) -> dict[str, str]:
    return {key: str(value) for key, value in flatten(dataclasses.asdict(config))}


def _ids(folder: Path) -> dict[str, Any]:
    path = folder / IDS
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _remember(folder: Path, name: str, what: Mapping[str, object]) -> None:
    text = json.dumps({**_ids(folder), name: what}) + "\n"
    files.replace(folder / IDS, lambda path: path.write_text(text, "utf-8"))
