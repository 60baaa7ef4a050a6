"""The paper's data protocols: on data made here by the rules, and on the real samples where they are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ferret_ext.federated.config import DatasetConfig
from ferret_ext.federated.data import instructions
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.protocols import PROTOCOLS
from ferret_ext.federated.data.sources import Splits


def read(name: str, source: Path | str, seed: int = 0, **settings: Any) -> Splits:
    return PROTOCOLS[name].read(DatasetConfig(protocol=name, **settings), str(source), seed)


def write_task(folder: Path, name: str, lengths: list[int]) -> None:
    instances = [
        {"id": f"{name}-{i}", "input": "x" * n, "output": [f"{i}", "other"]} for i, n in enumerate(lengths)
    ]
    content = {"Definition": [f"Do {name}.", "Or else."], "Instances": instances}
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "tasks" / f"{name}.json").write_text(json.dumps(content))


def write_lists(folder: Path, train: list[str], test: list[str], name: str = "default") -> None:
    lists = folder / "splits" / name
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train_tasks.txt").write_text("\n".join(train) + "\n")
    (lists / "test_tasks.txt").write_text("\n".join(test) + "\n")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_task(tmp_path, "large", [1023] * 104 + [1024] * 7 + [2000] * 2)
    write_task(tmp_path, "twenty", [5] * 20)
    write_task(tmp_path, "small", [5] * 19 + [1024])
    write_task(tmp_path, "test_small", [5] * 20)
    write_task(tmp_path, "test_mid", [5] * 21 + [1500])
    write_task(tmp_path, "test_large", [5] * 1149)
    write_lists(tmp_path, ["large", "twenty", "small"], ["test_small", "test_mid", "test_large"])
    return tmp_path


def test_natural_instructions_samples_as_the_paper_says(tasks: Path) -> None:
    """104 short inputs give 20, 20 give 4, 19 none; of the test tasks 20 of 20, 20 of 21, 22 of 1149."""
    splits = read("natural-instructions", tasks)
    assert splits.test is not None
    assert Counter(record["task"] for record in splits.train) == {"large": 20, "twenty": 4}
    assert Counter(record["task"] for record in splits.test) == {
        "test_small": 20,
        "test_mid": 20,
        "test_large": 22,
    }
    assert max(len(record["input"]) for record in [*splits.train, *splits.test]) == 1023
    assert dict(splits.dropped["training"].counts) == {
        "with an input of 1024 characters or more": 10,
        "not in their task's sample": 84 + 16,
        "in tasks with fewer than 20": 19,
    }
    assert splits.dropped["training"].places == {"in tasks with fewer than 20": ["small"]}
    assert dict(splits.dropped["evaluation"].counts) == {
        "with an input of 1024 characters or more": 1,
        "not in their task's sample": 1 + 1127,
    }
    assert splits.notes == ["data: 2 of 3 training tasks have at least 20 instances"]


def test_natural_instructions_takes_the_first_definition_and_output(tasks: Path) -> None:
    for record in read("natural-instructions", tasks).train:
        assert record["instruction"] == f"Do {record['task']}."
        assert record.place == f"{record['task']}.json Instances[{record['output']}]"


def test_natural_instructions_follows_the_seed_and_not_the_other_tasks(tasks: Path) -> None:
    def chosen(seed: int, lists: str = "default") -> list[str]:
        train = read("natural-instructions", tasks, seed, task_lists=lists).train
        return [record.place for record in train if record["task"] == "large"]

    write_lists(tasks, ["large"], ["test_mid"], "few")
    assert chosen(3) == chosen(3) == chosen(3, "few")
    assert chosen(3, str(tasks / "splits" / "few")) == chosen(3)
    assert chosen(3) != chosen(4)


def test_natural_instructions_mixes_the_test_tasks(tasks: Path) -> None:
    test = read("natural-instructions", tasks).test
    assert test is not None
    assert len({record["task"] for record in test[:15]}) == 3


def test_natural_instructions_takes_columns_as_the_hub_has_them(tmp_path: Path) -> None:
    def rows(task: str, count: int) -> list[dict[str, str]]:
        row = {"task_name": task, "definition": f"Do {task}.", "inputs": "a"}
        return [
            {**row, "id": f"{task}-{i}", "targets": text} for i in range(count) for text in ("one", "two")
        ]

    for split, content in (("train", [*rows("b", 25), *rows("a", 40)]), ("test", rows("c", 21))):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    splits = read("natural-instructions", tmp_path)
    assert [record["task"] for record in splits.train] == ["a"] * 8 + ["b"] * 5
    assert {record["output"] for record in splits.train} == {"one"}
    assert splits.train[0]["instruction"] == "Do a."
    assert splits.dropped["training"].counts["further outputs for one input"] == 65
    assert len(splits.test or []) == 20


def test_natural_instructions_says_what_is_missing(tasks: Path) -> None:
    def refuse(message: str, **settings: Any) -> None:
        with pytest.raises(DataError, match=message):
            read("natural-instructions", tasks, **settings)

    refuse("absent/train_tasks.txt: expected a list of tasks, found no file", task_lists="absent")
    refuse("expected neither with protocol natural-instructions", columns="a=b")
    write_lists(tasks, ["large", "gone"], ["test_mid"])
    refuse("train_tasks.txt line 2: expected the file gone.json in .*tasks, found none")
    write_lists(tasks, ["large", "", "large"], ["test_mid"])
    refuse("train_tasks.txt line 3: expected every task once, large is in line 1")
    write_lists(tasks, ["large"], ["large"])
    refuse("expected no task in both lists, found large")
    write_lists(tasks, ["large"], [])
    refuse("test_tasks.txt: expected a task a line, found none")
    write_lists(tasks, ["large"], ["broken"])
    (tasks / "tasks" / "broken.json").write_text('{"Instances": []}')
    refuse("broken.json: expected a task with Definition and Instances")


def test_natural_instructions_takes_what_the_generator_writes(tmp_path: Path) -> None:
    instructions.write(tmp_path, count=300)
    splits = read("natural-instructions", tmp_path / "natural_instructions")
    assert Counter(record["task"] for record in splits.train) == {
        task.name: 4 for task in instructions.TASKS[:-3]
    }


def test_dolly_holds_out_the_last_category() -> None:
    splits = read("dolly", "builtin:dolly")
    assert {record["category"] for record in splits.test or []} == {"summarization"}
    assert "summarization" not in {record["category"] for record in splits.train}
    assert len(splits.train) + len(splits.test or []) == 3000
    assert splits.notes == [
        "data: the category summarization, 200 records, is held out for evaluation",
        "data: the split test, 300 records, is not used",
    ]


def write_json(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_dolly_needs_two_categories_in_every_record(tmp_path: Path) -> None:
    record = {"instruction": "a", "context": "", "response": "b"}
    one = write_json(tmp_path / "one.json", [{**record, "category": "x"}] * 3)
    with pytest.raises(DataError, match="expected at least two values of category, found only x"):
        read("dolly", one)
    some = write_json(tmp_path / "some.json", [{**record, "category": "x"}, {**record, "category": None}])
    with pytest.raises(DataError, match=r"the column category .* it is empty at some.json\[1\]"):
        read("dolly", some)


def code(language: str, **more: str) -> dict[str, str]:
    return {"instruction": "Write it.", "input": language, "output": "x = 1", **more}


def test_codealpaca_takes_the_language_from_input_and_drops_assembly(tmp_path: Path) -> None:
    """The layout of the paper's file."""
    records = [code("Python"), code("X86-64 Assembly"), code("C++"), code("Python")]
    splits = read("codealpaca", write_json(tmp_path / "rosetta.json", records))
    assert [record["language"] for record in splits.train] == ["Python", "C++", "Python"]
    assert dict(splits.dropped["training"].counts) == {"in X86-64 Assembly": 1}
    assert splits.test is None


def test_codealpaca_chooses_from_a_test_split_too(tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", [code("Python"), code("C++")])
    write_json(tmp_path / "test.json", [code("X86-64 Assembly"), code("Python"), code("")])
    splits = read("codealpaca", tmp_path)
    assert [record["language"] for record in splits.test or []] == ["Python"]
    assert splits.dropped["evaluation"].counts.total() == 2


def test_codealpaca_takes_the_language_from_a_labels_file(tmp_path: Path) -> None:
    """The layout of the 20k file, whose input is data and mostly empty."""
    data = write_json(tmp_path / "code.json", [code(""), code("1 2"), code(""), code("3")])
    languages = ["SQL", "unknown", "x86-64 assembly", "Go"]
    lines = [json.dumps({"index": i, "language": name}) for i, name in enumerate(languages)]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    splits = read("codealpaca", data, labels_file=str(tmp_path / "labels.jsonl"))
    assert [record["language"] for record in splits.train] == ["SQL", "Go"]
    assert splits.train[1]["input"] == "3"
    assert splits.dropped["training"].places == {"without a language": ["code.json[1]"]}
    with pytest.raises(DataError, match="found 3 different inputs, 2 of 4 empty; name them by"):
        read("codealpaca", data)


def test_codealpaca_takes_a_column_of_another_name(tmp_path: Path) -> None:
    data = write_json(tmp_path / "code.json", [code("", lang="C"), code("1", lang="R")])
    splits = read("codealpaca", data, columns="language=lang")
    assert [record["language"] for record in splits.train] == ["C", "R"]


def test_gsm8k_needs_the_official_splits(tmp_path: Path) -> None:
    splits = read("gsm8k", "builtin:gsm8k")
    record = splits.train[0]
    assert (record["instruction"], record["output"]) == (record["question"], record["answer"])
    assert (len(splits.train), len(splits.test or [])) == (3000, 300)
    lines = tmp_path / "train.jsonl"
    lines.write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(DataError, match="expected the official splits train and test, found no test"):
        read("gsm8k", lines)


def test_real_natural_instructions(real_data: Path) -> None:
    splits = read("natural-instructions", real_data / "natural_instructions", task_lists="sample")
    by_task = Counter(record["task"] for record in splits.train)
    assert len(by_task) == 29  # all inputs of task002 are too long
    assert by_task["task141_odd-man-out_classification_category"] == 40
    assert by_task["task1572_samsum_summary"] <= 36
    assert Counter(record["task"].split("_")[0] for record in splits.test or []) == {
        "task020": 20,
        "task033": 20,
        "task1557": 20,
    }
    assert sum(splits.dropped["training"].counts.values()) + len(splits.train) == 5940


def test_real_dolly(real_data: Path) -> None:
    splits = read("dolly", real_data / "dolly" / "databricks-dolly-15k.jsonl")
    assert (len(splits.train), len(splits.test or [])) == (8278, 722)
    assert len({record["category"] for record in splits.train}) == 7


def test_real_codealpaca(real_data: Path) -> None:
    folder = real_data / "codealpaca"
    splits = read(
        "codealpaca", folder / "code_alpaca_2k.json", labels_file=str(folder / "language_ids.jsonl")
    )
    languages = Counter(record["language"] for record in splits.train)
    assert (languages["Python"], languages["C++"], len(languages)) == (809, 58, 19)
    assert dict(splits.dropped["training"].counts) == {"without a language": 310}


def test_real_gsm8k(real_data: Path) -> None:
    splits = read("gsm8k", real_data / "gsm8k")
    assert (len(splits.train), len(splits.test or [])) == (7473, 1319)
