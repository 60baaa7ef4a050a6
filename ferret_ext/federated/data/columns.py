"""Columns that records get besides their own: copies under the names that a format wants, and labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.records import Record
from ferret_ext.federated.data.sources import read_file

INDEX, FILE = "index", "file"  # columns of a labels file that say which record a line is about


def read_mapping(text: str) -> dict[str, str]:
    """ "instruction=question, output=answer" as wanted name -> name in the data. Raises DataError."""
    mapping = {}
    for pair in text.split(","):
        wanted, _, present = (part.strip() for part in pair.partition("="))
        if not wanted or not present:
            raise DataError(f"dataset.columns: expected WANTED=PRESENT, .., got {text!r}")
        mapping[wanted] = present
    return mapping


def copy_columns(records: list[Record], mapping: dict[str, str], source: str) -> list[Record]:
    """The records with columns under the wanted names, too. Raises DataError where one is not in the data."""
    names = {name for record in records for name in record}
    if missing := [present for present in mapping.values() if present not in names]:
        raise DataError(
            f"data {source}: dataset.columns: expected the column {', '.join(missing)}, "
            f"found {', '.join(sorted(names))}"
        )
    return [
        record.having({wanted: record.get(present) for wanted, present in mapping.items()})
        for record in records
    ]


def join_labels(records: list[Record], path: Path, source: str) -> list[Record]:
    """The records with the columns of the labels file, whose column `index` counts the records from 0.

    A column `file`, where there is one, must name the records' file. Raises DataError unless there is one
    line for each record, and where a column is in both files.
    """
    if not path.is_file():
        raise DataError(f"dataset.labels_file: expected a file, found none at {path}")
    labels: list[Record | None] = [None] * len(records)
    for line in read_file(path):
        index, file = line.get(INDEX), line.get(FILE)
        if not _is_index(index, len(records)) or labels[int(index)] is not None:  # type: ignore[arg-type]
            raise DataError(
                f"dataset.labels_file {path}: expected one line for each index from 0 to {len(records) - 1}, "
                f"got index {index} at {line.place}"
            )
        if file is not None and file != Path(source).name:
            raise DataError(
                f"dataset.labels_file {path}: expected lines about {Path(source).name}, got {file} "
                f"at {line.place}"
            )
        labels[int(index)] = line  # type: ignore[arg-type]
    if absent := [index for index, label in enumerate(labels) if label is None]:
        raise DataError(
            f"dataset.labels_file {path}: expected a line for each of {len(records)} records, {len(absent)} "
            f"have none, the first of them index {absent[0]}"
        )
    return [_joined(record, label, path) for record, label in zip(records, labels, strict=True) if label]


def values(records: Iterable[Record], column: str, source: str) -> list[str]:
    """Every record's value of a column, as text. Raises DataError where a record has none."""
    texts = []
    for record in records:
        value = record.get(column)
        if value is None or not str(value).strip():
            found = f"found {', '.join(sorted(record))}" if column not in record else "it is empty"
            raise DataError(
                f"data {source}: expected a value in the column {column} of every training record, {found} "
                f"at {record.place}"
            )
        texts.append(str(value).strip())
    return texts


def _is_index(value: object, count: int) -> bool:
    text = str(value)
    return text.isdecimal() and int(text) < count


def _joined(record: Record, label: Record, path: Path) -> Record:
    columns = {name: value for name, value in label.items() if name not in (INDEX, FILE)}
    if both := sorted(columns.keys() & record.keys()):
        raise DataError(
            f"dataset.labels_file {path}: expected new columns, {', '.join(both)} is in the data too"
        )
    return record.having(columns)
