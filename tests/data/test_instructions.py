"""The text that the project makes itself: right answers, the four formats, equal for equal seeds."""

from __future__ import annotations

import ast
import re
from random import Random

import pytest

from ferret_ext.federated.data import instructions
from ferret_ext.federated.data.instructions import TASKS, Task

MARK = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


@pytest.mark.parametrize("name", instructions.SETS)
def test_sets_follow_from_count_and_seed(name: str) -> None:
    make = instructions.SETS[name]
    assert list(make(40, 3)) == list(make(40, 3))
    assert list(make(40, 3)) != list(make(40, 4))
    assert list(make(40, 3))[:10] == list(make(10, 3))


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("alpaca", {"instruction", "input", "output"}),
        ("dolly", {"instruction", "context", "response", "category"}),
        ("gsm8k", {"question", "answer"}),
    ],
)
def test_sets_have_the_columns_of_their_format(name: str, columns: set[str]) -> None:
    for record in instructions.SETS[name](60, 0):
        assert set(record) == columns
        assert all(isinstance(value, str) for value in record.values())


def test_word_problems_compute_rightly_and_end_in_their_number() -> None:
    for record in instructions.gsm8k(200, 0):
        *steps, last = record["answer"].split("\n")
        for step in steps:
            left, sign, right, marked, written = MARK.search(step).groups()  # type: ignore[union-attr]
            assert COMPUTE[sign](int(left), int(right)) == int(marked) == int(written)
        assert last == f"#### {marked}"


def answers(name: str) -> list[tuple[str, str]]:
    task = next(task for task in TASKS if task.name == name)
    random = Random(0)
    return [task.draw(random) for _ in range(50)]


def test_tasks_have_right_answers() -> None:
    for given, wanted in answers("addition"):
        assert sum(int(number) for number in given.split(" + ")) == int(wanted)
    for given, wanted in answers("sorting_numbers"):
        assert sorted(map(int, given.split())) == list(map(int, wanted.split()))
    for given, wanted in answers("sorting_words"):
        assert sorted(given.split()) == wanted.split()
    for given, wanted in answers("reversing"):
        assert given.split()[::-1] == wanted.split()
    for given, wanted in answers("counting"):
        assert len(given.split()) == int(wanted)
    for given, wanted in answers("largest_number"):
        assert max(map(int, given.split())) == int(wanted)
    for given, wanted in answers("copying"):
        assert given == wanted
    for given, wanted in answers("capital_letters"):
        assert given.upper() == wanted
    for given, wanted in answers("city_in_text"):
        assert f"lives in {wanted} " in given
    for given, wanted in answers("who_has_it"):
        thing = given.rpartition(" the ")[2].rstrip("?")
        assert f"{wanted} has a {thing}." in given


@pytest.mark.parametrize("name", ["python_function", "python_loop"])
def test_snippets_are_python(name: str) -> None:
    for _, snippet in answers(name):
        ast.parse(snippet)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_natural_instructions_tasks_have_the_official_layout(task: Task) -> None:
    content = instructions.natural_instructions_task(task, 5, 0)
    assert content["Definition"] == [task.definition]
    assert content["Categories"] == [task.category]
    assert len({instance["id"] for instance in content["Instances"]}) == 5
    for instance in content["Instances"]:
        assert instance["input"]
        assert len(instance["output"]) == 1
        assert instance["output"][0]


def test_dolly_has_records_with_and_without_a_context() -> None:
    contexts = [record["context"] for record in instructions.dolly(100, 0)]
    assert "" in contexts
    assert any(contexts)
