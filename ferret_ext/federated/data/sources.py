"""Where records come from: JSON and JSONL files, folders of them, hub data sets, and text made here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferret_ext.federated.data import instructions
from ferret_ext.federated.data.errors import DataError

BUILTIN = "builtin:"
SUFFIXES = (".jsonl", ".json")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """The records of a source; `test` is None where the source has no such split."""

    train: list[Record]
    test: list[Record] | None


def read(
    source: str, train_split: str = "train", eval_split: str = "test", config_name: str | None = None
) -> Splits:
    """The records of `source`.

    source: "builtin:NAME" (see `instructions.SETS`), a .json or .jsonl file, a folder with one such file a
    split, or the name of a data set on the hub. Raises DataError.
    """
    if source.startswith(BUILTIN):
        return _generate(source.removeprefix(BUILTIN))
    path = Path(source).expanduser()
    if path.is_file():
        return Splits(_read_file(path), None)
    if path.is_dir():
        return _read_folder(path, train_split, eval_split)
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"data {source}: expected a file or a folder, found neither")
    return _read_hub(source, config_name, train_split, eval_split)


def _generate(name: str) -> Splits:
    if name not in instructions.SETS:
        known = ", ".join(f"{BUILTIN}{key}" for key in instructions.SETS)
        raise DataError(f"data {BUILTIN}{name}: expected one of {known}")
    make = instructions.SETS[name]
    return Splits(list(make(3000, seed=1)), list(make(300, seed=2)))


def _read_folder(folder: Path, train_split: str, eval_split: str) -> Splits:
    found = {split: path for split in (train_split, eval_split) if (path := _split_file(folder, split))}
    if train_split not in found:
        raise DataError(
            f"data {folder}: expected {train_split}.jsonl or {train_split}.json in it, found neither"
        )
    test = _read_file(found[eval_split]) if eval_split in found else None
    return Splits(_read_file(found[train_split]), test)


def _split_file(folder: Path, split: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()), None)


def _read_file(path: Path) -> list[Record]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"data {path}: expected a .json or .jsonl file, got {path.suffix or 'no suffix'}")
    records = _read_task(path) or _read_json(path)
    if not records:
        raise DataError(f"data {path}: expected records, found none")
    return records


def _read_json(path: Path) -> list[Record]:
    import datasets  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    if path.stat().st_size == 0:
        return []
    try:
        return list(datasets.load_dataset("json", data_files=str(path), split="train"))
    except (
        datasets.exceptions.DatasetGenerationError,
        datasets.exceptions.DataFilesNotFoundError,
        ValueError,
    ) as error:
        raise DataError(
            f"data {path}: expected JSON records, one a line or in one list: {_root(error)}"
        ) from None


def _read_task(path: Path) -> list[Record] | None:
    """The instances of a Natural Instructions task file as instruction records; None if it is no such file.

    `Definition` is a list in version 2 and a string before; `output` is a list of references, whose first is
    taken.
    """
    if path.suffix != ".json":
        return None
    try:
        task = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None  # possibly JSON lines: for `datasets` to judge
    if not isinstance(task, dict) or not {"Definition", "Instances"} <= task.keys():
        return None
    try:
        definition = _first(task["Definition"])
        return [
            {"instruction": definition, "input": instance["input"], "output": _first(instance["output"])}
            for instance in task["Instances"]
        ]
    except (KeyError, TypeError):
        raise DataError(f"data {path}: expected Instances with input and output each") from None


def _first(texts: str | list[str]) -> str:
    return texts if isinstance(texts, str) else next(iter(texts), "")


def _read_hub(name: str, config_name: str | None, train_split: str, eval_split: str) -> Splits:
    import datasets

    try:
        splits = datasets.load_dataset(name, config_name)
    except Exception as error:  # the hub's client raises many kinds, none of which a user can act on by type
        raise DataError(
            f"data {name}: no such file or folder, and not to be had from the hub: {_first_line(error)}"
        ) from None
    if train_split not in splits:
        raise DataError(f"data {name}: expected a split {train_split}, found {', '.join(splits)}")
    return Splits(list(splits[train_split]), list(splits[eval_split]) if eval_split in splits else None)


def _root(error: BaseException) -> str:
    """The first line of what lies at the bottom of a chain of errors."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
