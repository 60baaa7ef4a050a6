"""Reading records: files, folders, task files, and what is wrong with them."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ferret_ext.federated.data import instructions, sources
from ferret_ext.federated.data.errors import DataError

TABLES = {".csv": "excel", ".tsv": "excel-tab"}
RECORDS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_read_takes_json_lines_and_a_json_list(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", RECORDS)
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(RECORDS))
    for path in (lines, listed):
        splits = sources.read(str(path))
        assert [dict(record) for record in splits.train] == RECORDS
        assert splits.test is None


def test_read_takes_a_folder_with_one_file_a_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", RECORDS)
    write_lines(tmp_path / "test.jsonl", RECORDS[:2])
    splits = sources.read(str(tmp_path))
    assert len(splits.train) == 5
    assert splits.test is not None
    assert len(splits.test) == 2
    assert sources.read(str(tmp_path), train_split="test", eval_split="train").train == splits.test


def test_read_holds_out_for_no_other_split_than_test(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", RECORDS)
    write_lines(tmp_path / "validation.jsonl", RECORDS)
    assert sources.read(str(tmp_path)).test is None
    with pytest.raises(DataError, match="expected a split tset, found train, validation"):
        sources.read(str(tmp_path), eval_split="tset")
    with pytest.raises(DataError, match="expected a split validation, found train"):
        sources.read(str(path), eval_split="validation")
    with pytest.raises(DataError, match="expected a split dev, found test, train"):
        sources.read("builtin:alpaca", eval_split="dev")
    with pytest.raises(DataError, match="expected a split trian, found train, validation"):
        sources.read(str(tmp_path), train_split="trian")


@pytest.mark.parametrize("definition", ["Say it.", ["Say it.", "Or else."]])
def test_read_takes_natural_instructions_tasks(tmp_path: Path, definition: str | list[str]) -> None:
    instances = [{"input": "a", "output": ["b", "c"]}, {"id": "2", "input": "d", "output": [""]}]
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"Definition": definition, "Instances": instances}))
    assert sources.read(str(path)).train == [
        {"instruction": "Say it.", "input": "a", "output": "b"},
        {"instruction": "Say it.", "input": "d", "output": ""},
    ]


def test_read_takes_what_the_generator_writes(tmp_path: Path) -> None:
    instructions.write(tmp_path, count=30)
    for name, make in instructions.SETS.items():
        assert [dict(r) for r in sources.read(str(tmp_path / f"{name}.jsonl")).train] == list(make(30, 0))
    task = sources.read(str(tmp_path / "natural_instructions" / "tasks" / "addition.json"))
    assert set(task.train[0]) == {"instruction", "input", "output"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"a": 1}\n\n{"a": \n', "expected JSON records, .*: line 3: Expecting value$"),
        ("words.jsonl", '{"a": 1}\n"a"\n', 'line 2: expected an object, got "a"'),
        ("cut.json", '[{"a": 1},\n{"a"', "list: Expecting ':' delimiter: line 2"),
        ("empty.jsonl", "", "expected records, found none"),
        ("list.json", "[]", "expected JSON records"),
        (
            "task.json",
            '{"Definition": "a", "Instances": [{"input": "b"}]}',
            r"expected Instances .*, found input in Instances\[0\]",
        ),
        ("text.txt", "a", "expected a .jsonl, .json, .parquet, .csv or .tsv file, got .txt"),
    ],
)
def test_read_says_what_is_wrong_with_a_file(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    logger, logged = logging.getLogger("datasets"), io.StringIO()
    logger.addHandler(handler := logging.StreamHandler(logged))
    request.addfinalizer(lambda: logger.removeHandler(handler))
    with pytest.raises(DataError, match=message) as caught:
        sources.read(str(path))
    assert str(path) in str(caught.value)
    assert logged.getvalue() == ""


TABLE = [{"question": "1 + 1?", "answer": "007"}, {"question": 'a, "b"\nc', "answer": "NA"}]


def write_table(path: Path) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"], dialect=TABLES[path.suffix])
        writer.writeheader()
        writer.writerows(TABLE)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_read_takes_tables_and_keeps_text_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"table{suffix}")
    records = sources.read(str(path)).train
    assert records == TABLE
    assert [record.place for record in records] == [f"table{suffix} row 1", f"table{suffix} row 2"]


def test_records_know_their_line_or_index(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"a": "x"}\n\n{"a": "y"}\n')
    listed = tmp_path / "list.json"
    listed.write_text('[\n{"a": "x"},\n{"a": "y"}]')
    flat = tmp_path / "flat.json"
    flat.write_text('[{"a": "x"}]')
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"Definition": "d", "Instances": [{"input": "a", "output": "b"}]}))
    places = {
        path.name: [record.place for record in sources.read(str(path)).train]
        for path in (lines, listed, flat, task)
    }
    assert places == {
        "lines.jsonl": ["lines.jsonl line 1", "lines.jsonl line 3"],
        "list.json": ["list.json[0]", "list.json[1]"],
        "flat.json": ["flat.json[0]"],
        "task.json": ["task.json Instances[0]"],
    }
    assert sources.read("builtin:gsm8k").train[4].place == "train record 5"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ragged.csv", "a,b\n1,2\n1,2,3\n", "expected a .csv table: .* line 3, saw 3"),
        ("twice.csv", "a,a\n1,2\n", "expected different column names, got a, a"),
        ("binary.csv", "a\n\udcff", "expected a"),
        ("text.parquet", "a", "expected a .parquet table"),
    ],
)
def test_read_says_what_is_wrong_with_a_table(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        sources.read(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_says_which_protocol_a_folder_of_tasks_wants(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    with pytest.raises(DataError, match="protocol=natural-instructions"):
        sources.read(str(tmp_path))


def test_read_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file or a folder, found neither"):
        sources.read(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"expected a file a split in it .*, found none"):
        sources.read(str(tmp_path))
    with pytest.raises(DataError, match="expected one of builtin:alpaca, builtin:dolly, builtin:gsm8k"):
        sources.read("builtin:nothing")
