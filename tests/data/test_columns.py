"""Columns under other names, labels from a file of their own, and a column's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ferret_ext.federated.data.columns import copy_columns, join_labels, read_mapping, values
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.records import Record

RECORDS = [Record({"q": letter, "a": letter.upper()}, f"data.json[{i}]") for i, letter in enumerate("xyz")]


def labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_copied_columns_stand_beside_the_old_ones() -> None:
    copied = copy_columns(RECORDS, read_mapping("instruction=q, output = a"), "data.json")
    assert copied[1] == {"q": "y", "a": "Y", "instruction": "y", "output": "Y"}
    assert copied[1].place == "data.json[1]"
    assert "instruction" not in RECORDS[1]


@pytest.mark.parametrize("text", ["", "instruction", "instruction=", "=q", "a=b,,c=d"])
def test_mapping_says_what_it_expects(text: str) -> None:
    with pytest.raises(DataError, match=r"dataset\.columns: expected WANTED=PRESENT"):
        read_mapping(text)


def test_copy_says_which_column_is_missing() -> None:
    with pytest.raises(DataError, match=r"data d: dataset.columns: expected the column query, found a, q"):
        copy_columns(RECORDS, {"instruction": "query"}, "d")


@pytest.mark.parametrize("file", [{}, {"file": "data.json"}])
def test_labels_join_by_index_in_any_order(tmp_path: Path, file: dict[str, str]) -> None:
    rows = [{**file, "index": i, "language": f"L{i}"} for i in (2, 0, 1)]
    joined = join_labels(RECORDS, labels(tmp_path / "l.jsonl", rows), "some/data.json")
    assert [record["language"] for record in joined] == ["L0", "L1", "L2"]
    assert joined[2] == {"q": "z", "a": "Z", "language": "L2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"language": "C"}], "one line for each index from 0 to 2, got index None at l.jsonl line 1"),
        ([{"index": 0}, {"index": 3}], "got index 3 at l.jsonl line 2"),
        ([{"index": 0}, {"index": -1}], "got index -1 at l.jsonl line 2"),
        ([{"index": 1}, {"index": 1}], "got index 1 at l.jsonl line 2"),
        ([{"index": 0, "file": "other.json"}], "lines about data.json, got other.json at l.jsonl line 1"),
        ([{"index": 1}, {"index": 2}], "each of 3 records, 1 have none, the first of them index 0"),
        ([{"index": i, "q": "new"} for i in range(3)], "expected new columns, q is in the data too"),
    ],
)
def test_join_says_what_does_not_fit(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        join_labels(RECORDS, labels(tmp_path / "l.jsonl", rows), "data.json")
    with pytest.raises(DataError, match=r"labels_file: expected a file, found none at .*absent"):
        join_labels(RECORDS, tmp_path / "absent.jsonl", "data.json")


def test_values_say_where_one_is_missing() -> None:
    assert values(RECORDS, "q", "d") == ["x", "y", "z"]
    with pytest.raises(DataError, match=r"in the column key of every .*, found a, q at data.json\[0\]"):
        values(RECORDS, "key", "d")
    empty = [RECORDS[0], Record({"q": " "}, "data.json[7]")]
    with pytest.raises(DataError, match=r"it is empty at data.json\[7\]"):
        values(empty, "q", "d")
