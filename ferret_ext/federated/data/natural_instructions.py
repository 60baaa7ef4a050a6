"""Natural Instructions as the paper samples it: tasks from files in the official layout or from columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from ferret_ext.federated.config import DatasetConfig
from ferret_ext.federated.data import columns, sources
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.records import Record, Tally
from ferret_ext.federated.data.sources import Splits
from ferret_ext.federated.seeds import derive

Task = tuple[str, list[Record]]  # name and instances, as instruction records with a column `task`

MAX_CHARACTERS = 1024  # a longer input is left out
MIN_INSTANCES = 20  # a training task with fewer is left out, a test task with up to as many is taken whole


def natural_instructions(dataset: DatasetConfig, source: str, seed: int = 0) -> Splits:
    """Samples of the training tasks and of the test tasks; the column `task` has the task's name.

    Inputs of 1024 characters or more are left out. Of a training task with at least 20 instances left a fifth
    is sampled, a smaller one is left out. Of a test task with more than 20 instances a fiftieth, but at least
    20, is sampled. First definition, first output. The evaluation records are shuffled, so that the first of
    them are of many tasks. source: a folder in the official layout (tasks/NAME.json,
    splits/FOLDER/train_tasks.txt and test_tasks.txt), or records with task_name, definition, inputs, targets.
    """
    if dataset.columns is not None or dataset.labels_file is not None:
        raise DataError(
            "dataset.columns, dataset.labels_file: expected neither with protocol natural-instructions"
        )
    folder = Path(source).expanduser()
    official = (folder / "tasks").is_dir()
    tallies = {"training": Tally(), "evaluation": Tally()}
    train_tasks, test_tasks = (
        _listed(folder, dataset.task_lists) if official else _grouped(dataset, source, tallies)
    )
    samples = [_training_sample(*task, seed, tallies["training"]) for task in train_tasks]
    test = [record for task in test_tasks for record in _test_sample(*task, seed, tallies["evaluation"])]
    used = sum(map(bool, samples))
    notes = [f"data: {used:,} of {len(samples):,} training tasks have at least {MIN_INSTANCES} instances"]
    order = np.random.Generator(np.random.PCG64(derive(seed, "test tasks"))).permutation(len(test))
    return Splits([*chain.from_iterable(samples)], [test[i] for i in order], tallies, notes)


def _training_sample(name: str, instances: list[Record], seed: int, tally: Tally) -> list[Record]:
    short = _short(instances, tally)
    if len(short) < MIN_INSTANCES:
        tally.add(f"in tasks with fewer than {MIN_INSTANCES}", name, len(short))
        return []
    return _sample(short, len(short) // 5, derive(seed, f"sample {name}"), tally)


def _test_sample(name: str, instances: list[Record], seed: int, tally: Tally) -> list[Record]:
    short = _short(instances, tally)
    size = max(MIN_INSTANCES, len(short) // 50) if len(short) > MIN_INSTANCES else len(short)
    return _sample(short, size, derive(seed, f"sample {name}"), tally)


def _short(instances: list[Record], tally: Tally) -> list[Record]:
    short = [instance for instance in instances if len(instance["input"]) < MAX_CHARACTERS]
    tally.add(f"with an input of {MAX_CHARACTERS} characters or more", count=len(instances) - len(short))
    return short


def _sample(records: list[Record], size: int, seed: int, tally: Tally) -> list[Record]:
    """`size` of the records, drawn without replacement, in their order."""
    tally.add("not in their task's sample", count=len(records) - size)
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(len(records), size, replace=False)
    return [records[i] for i in sorted(drawn.tolist())]


def _listed(folder: Path, lists: str) -> tuple[Iterator[Task], Iterator[Task]]:
    """The training and the test tasks of a folder in the official layout, read one at a time."""
    where = folder / "splits" / lists
    where = where if where.is_dir() else Path(lists).expanduser()
    train, test = (_read_list(where / f"{split}_tasks.txt") for split in ("train", "test"))
    if both := sorted(train.keys() & test.keys()):
        raise DataError(f"data {where}: expected no task in both lists, found {both[0]}")
    for split, names in (("train", train), ("test", test)):
        for name, line in names.items():
            if not (folder / "tasks" / f"{name}.json").is_file():
                raise DataError(
                    f"data {where / f'{split}_tasks.txt'} line {line}: expected the file {name}.json in "
                    f"{folder / 'tasks'}, found none; lists of your own go by dataset.task_lists"
                )
    return _task_files(folder, train), _task_files(folder, test)


def _task_files(folder: Path, names: dict[str, int]) -> Iterator[Task]:
    for name in names:
        path = folder / "tasks" / f"{name}.json"
        if (records := sources.read_task(path)) is None:
            raise DataError(f"data {path}: expected a task with Definition and Instances")
        yield name, [record.having({"task": name}) for record in records]


def _read_list(path: Path) -> dict[str, int]:
    """Task names and their lines. Raises DataError."""
    if not path.is_file():
        raise DataError(f"data {path}: expected a list of tasks, found no file")
    names: dict[str, int] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        name = line.strip().removesuffix(".json")
        if name and (Path(name).name != name or "\\" in name):
            raise DataError(f"data {path} line {number}: expected a task's name, found a path, {name!r:.80}")
        if name in names:
            raise DataError(
                f"data {path} line {number}: expected every task once, {name} is in line {names[name]}"
            )
        if name:
            names[name] = number
    if not names:
        raise DataError(f"data {path}: expected a task a line, found none")
    return names


def _grouped(
    dataset: DatasetConfig, source: str, tallies: dict[str, Tally]
) -> tuple[Iterator[Task], Iterator[Task]]:
    """The tasks of records with task_name, definition, inputs and targets."""
    splits = sources.read(source, dataset.train_split, dataset.eval_split, dataset.config_name)
    if splits.test is None:
        raise DataError(
            f"data {source}: expected training and test tasks, found no split {dataset.eval_split}"
        )
    train = _group(splits.train, source, tallies["training"])
    return train, _group(splits.test, source, tallies["evaluation"])


def _group(records: list[Record], source: str, tally: Tally) -> Iterator[Task]:
    """Tasks in the order of their names; of records with one id, which differ in the output, the first."""
    names = {"task": "task_name", "instruction": "definition", "input": "inputs", "output": "targets"}
    tasks: dict[str, dict[object, Record]] = {}
    for record in columns.copy_columns(records, names, source):
        instances, key = tasks.setdefault(str(record["task"]), {}), record.get("id") or record.place
        if key in instances:
            tally.add("further outputs for one input")
        else:
            instances[key] = record.having({"input": str(record["input"] or "")})
    for name in sorted(tasks):
        yield name, list(tasks[name].values())
