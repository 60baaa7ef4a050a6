"""Where records come from: files, folders of them, hub data sets, and text made here."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ferret_ext.federated.data import instructions
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.records import Record, Tally

BUILTIN = "builtin:"
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
SUFFIXES = tuple(READERS)  # the first that is there wins
EVAL_SPLIT = "test"  # where this one is absent, training records are held out; any other must be there

Found = dict[str, Callable[[], list[Record]]]  # split -> how to read it


@dataclass(frozen=True)
class Splits:
    """The records of a source; `test` is None where the source has no such split.

    What a protocol left out is in `dropped`, by "training" and "evaluation"; `notes` are lines for the user.
    """

    train: list[Record]
    test: list[Record] | None
    dropped: dict[str, Tally] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(
    source: str, train_split: str = "train", eval_split: str = EVAL_SPLIT, config_name: str | None = None
) -> Splits:
    """The records of `source`.

    source: "builtin:NAME" (see `instructions.SETS`), a .jsonl, .json, .parquet, .csv or .tsv file, which is
    one split, whatever its name, a folder with one such file a split, or the name of a data set on the hub.
    Only the test split may be absent. Raises DataError.
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
        return {train_split: partial(read_file, path)}
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
    return {
        "train": lambda: _numbered(make(3000, seed=1), "train record"),
        "test": lambda: _numbered(make(300, seed=2), "test record"),
    }


def _find_files(folder: Path) -> Found:
    paths = {path.stem: path for suffix in reversed(SUFFIXES) for path in folder.glob(f"*{suffix}")}
    if not paths:
        hint = "; for Natural Instructions give dataset.protocol=natural-instructions"
        raise DataError(
            f"data {folder}: expected a file a split in it ({', '.join(SUFFIXES)}), found none"
            f"{hint if (folder / 'tasks').is_dir() else ''}"
        )
    return {split: partial(read_file, path) for split, path in paths.items()}


def read_file(path: Path) -> list[Record]:
    """The records of one file, at least one. Raises DataError."""
    if path.suffix not in SUFFIXES:
        wanted = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DataError(f"data {path}: expected a {wanted} file, got {path.suffix or 'no suffix'}")
    records = (read_task(path) if path.suffix == ".json" else None) or _read_table(path)
    if not records:
        raise DataError(f"data {path}: expected records, found none")
    return records


def _read_table(path: Path) -> list[Record]:
    import datasets  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come back as ours
    if path.stat().st_size == 0:
        return []
    kind = READERS[path.suffix]
    options = _csv_options(path) if kind == "csv" else {}
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except (
        datasets.exceptions.DatasetGenerationError,
        datasets.exceptions.DataFilesNotFoundError,
        ValueError,
    ) as error:
        wanted = "JSON records, one a line or in one list" if kind == "json" else f"a {path.suffix} table"
        fault = _fault(path) if kind == "json" else None
        raise DataError(f"data {path}: expected {wanted}: {fault or _root(error)}") from None
    return [Record(row, place) for row, place in zip(rows, _places(path, len(rows)), strict=True)]


def _csv_options(path: Path) -> dict[str, Any]:
    """Every column as the text that it is: no number loses its zeros, no "NA" becomes nothing."""
    from datasets import Features, Value

    sep = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=sep))
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        raise DataError(f"data {path}: expected a line of column names first: {_first_line(error)}") from None
    if len(set(names)) < len(names):
        raise DataError(f"data {path}: expected different column names, got {', '.join(names)}")
    features = Features({name: Value("string") for name in names})
    return {"sep": sep, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _places(path: Path, count: int) -> list[str]:
    """Where each of a file's records stands: the line in JSON lines, the index in a list, else the row."""
    if path.suffix in (".json", ".jsonl"):
        with path.open("rb") as file:
            lines = {number: line for number, line in enumerate(file, start=1) if line.strip()}
        if len(lines) == count and not next(iter(lines.values())).lstrip().startswith(b"["):
            return [f"{path.name} line {number}" for number in lines]
        return [f"{path.name}[{index}]" for index in range(count)]
    return [f"{path.name} row {index + 1}" for index in range(count)]


def _numbered(rows: Iterable[Mapping[str, Any]], what: str) -> list[Record]:
    return [Record(row, f"{what} {number}") for number, row in enumerate(rows, start=1)]


def read_task(path: Path) -> list[Record] | None:
    """The instances of a Natural Instructions task file as instruction records; None if it is no such file.

    `Definition` is a list in version 2 and a string before; `output` is a list of references. The first of
    each is taken.
    """
    try:
        task = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None  # possibly JSON lines: for `datasets` to judge
    if not isinstance(task, dict) or not {"Definition", "Instances"} <= task.keys():
        return None
    definition = _first(task["Definition"])
    records = []
    for index, instance in enumerate(task["Instances"]):
        if not isinstance(instance, dict) or not {"input", "output"} <= instance.keys():
            found = ", ".join(instance) if isinstance(instance, dict) else type(instance).__name__
            raise DataError(
                f"data {path}: expected Instances with input and output each, found {found} "
                f"in Instances[{index}]"
            )
        columns = {
            "instruction": definition,
            "input": _first(instance["input"]),
            "output": _first(instance["output"]),
        }
        records.append(Record(columns, f"{path.name} Instances[{index}]"))
    return records


def _first(texts: Any) -> str:
    text = next(iter(texts), "") if isinstance(texts, list) else texts
    return "" if text is None else str(text)


def _find_on_hub(name: str, config_name: str | None) -> Found:
    import datasets

    try:
        splits = datasets.load_dataset(name, config_name, trust_remote_code=False)
    except Exception as error:  # the hub's client raises many kinds, none of which a user can act on by type
        raise DataError(
            f"data {name}: no such file or folder, and not to be had from the hub: {_first_line(error)}"
        ) from None
    return {split: partial(_numbered, records, f"{split} record") for split, records in splits.items()}


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
