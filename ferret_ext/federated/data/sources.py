"""Where records come from: JSON and JSONL files, folders of them, hub data sets, and text made here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ferret_ext.federated.data import instructions
from ferret_ext.federated.data.errors import DataError

BUILTIN = "builtin:"
SUFFIXES = (".jsonl", ".json")
EVAL_SPLIT = "test"  # where this one is absent, training records are held out; any other must be there

Record = Mapping[str, Any]
Found = dict[str, Callable[[], list[Record]]]  # split -> how to read it


@dataclass(frozen=True)
class Splits:
    """The records of a source; `test` is None where the source has no such split."""

    train: list[Record]
    test: list[Record] | None


def read(
    source: str, train_split: str = "train", eval_split: str = EVAL_SPLIT, config_name: str | None = None
) -> Splits:
    """The records of `source`.

    source: "builtin:NAME" (see `instructions.SETS`), a .json or .jsonl file, which is one split, whatever its
    name, a folder with one such file a split, or the name of a data set on the hub. Only the test split may
    be absent. Raises DataError.
    """
    found = _find(source, train_split, config_name)
    for split in (train_split, eval_split):
        if split not in found and (split == train_split or split != EVAL_SPLIT):
            splits = ", ".join(sorted(found)) or "none"
            raise DataError(f"data {source}: expected a split {split}, found {splits}")
    return Splits(found[train_split](), found[eval_split]() if eval_split in found else None)


def _find(source: str, train_split: str, config_name: str | None) -> Found:
    if source.startswith(BUILTIN):
        return _find_builtin(source.removeprefix(BUILTIN))
    path = Path(source).expanduser()
    if path.is_file():
        return {train_split: partial(_read_file, path)}
    if path.is_dir():
        return _find_files(path)
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"data {source}: expected a file or a folder, found neither")
    return _find_on_hub(source, config_name)


def _find_builtin(name: str) -> Found:
    if name not in instructions.SETS:
        known = ", ".join(f"{BUILTIN}{key}" for key in instructions.SETS)
        raise DataError(f"data {BUILTIN}{name}: expected one of {known}")
    make = instructions.SETS[name]
    return {"train": lambda: list(make(3000, seed=1)), "test": lambda: list(make(300, seed=2))}


def _find_files(folder: Path) -> Found:
    paths = {path.stem: path for suffix in reversed(SUFFIXES) for path in folder.glob(f"*{suffix}")}
    if not paths:
        raise DataError(f"data {folder}: expected a .jsonl or .json file a split in it, found none")
    return {split: partial(_read_file, path) for split, path in paths.items()}


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
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come back as ours
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
            f"data {path}: expected JSON records, one a line or in one list: {_fault(path) or _root(error)}"
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


def _find_on_hub(name: str, config_name: str | None) -> Found:
    import datasets

    try:
        splits = datasets.load_dataset(name, config_name)
    except Exception as error:  # the hub's client raises many kinds, none of which a user can act on by type
        raise DataError(
            f"data {name}: no such file or folder, and not to be had from the hub: {_first_line(error)}"
        ) from None
    return {split: partial(list, records) for split, records in splits.items()}


def _fault(path: Path) -> str | None:
    """What is wrong with a file of JSON lines, or one list of records; None if the syntax is right."""
    text = path.read_bytes()
    listed = path.suffix == ".json" and text.lstrip().startswith(b"[")
    for number, line in enumerate([text] if listed else text.split(b"\n"), start=1):
        where = "list" if listed else f"line {number}"
        try:
            value = json.loads(line) if line.strip() else {}
        except ValueError as error:
            return f"{where}: {error if listed else getattr(error, 'msg', error)}"  # one line has no line 1
        if not isinstance(value, list if listed else dict):
            return f"{where}: expected an object, got {line.decode().strip()[:40]}"
    return None


def _root(error: BaseException) -> str:
    """The first line of what lies at the bottom of a chain of errors."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
