"""The native code and the plain-torch reference against the known answers of tests/golden.txt."""

from pathlib import Path

import pytest
from support import BASES

from ferret_ext import _native, known_answers, reference

LINES = [
    line
    for line in (Path(__file__).parents[1] / "golden.txt").read_text().splitlines()
    if not line.startswith("#")
]
KIND = {basis: number for number, basis in enumerate(BASES, start=1)}


def lines(*names: str) -> list[pytest.param]:
    """Every line of these record types."""
    found = [line for line in LINES if line.split()[0] in names]
    assert {line.split()[0] for line in found} == set(names), "golden.txt lacks records"
    return [pytest.param(line, id=name_of(line)) for line in found]


def records(name: str) -> list[pytest.param]:
    """(arguments, values) of every line of one record type."""
    found = [line for line in LINES if line.split()[0] == name]
    assert found, f"golden.txt has no {name} records"
    return [pytest.param(*split(line), id=name_of(line)) for line in found]


def split(line: str) -> tuple[list[str], str]:
    left, right = line.split(" : ")
    return left.split()[1:], right


def name_of(line: str) -> str:
    return line.split(" : ")[0].replace(" ", "-")


def cases(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("arguments", "values"), records(name))


def hex_words(words: list[int]) -> str:
    return " ".join(f"{int(word):08x}" for word in words)


@cases("philox")
def test_philox_matches_random123(arguments: list[str], values: str) -> None:
    words = [int(word, 16) for word in arguments]
    assert hex_words(_native.philox(words[:4], *words[4:])) == values
    assert hex_words(reference.philox(words[:4], (words[4], words[5]))) == values


@cases("words")
def test_words_match_golden(arguments: list[str], values: str) -> None:
    seed, basis, t, k = int(arguments[0], 16), arguments[1], int(arguments[2]), int(arguments[3])
    assert hex_words(_native.words(seed, KIND[basis], t, k)) == values
    assert hex_words(reference.words(seed, basis, t, k)) == values


@cases("integers")
def test_integers_match_golden(arguments: list[str], values: str) -> None:
    seed, basis = int(arguments[0], 16), arguments[1]
    offset, count, k = map(int, arguments[2:])
    expected = list(map(int, values.split()))
    assert _native.integers(seed, KIND[basis], offset, count, k) == expected
    assert reference.integers(seed, basis, offset, count, range(k, k + 1))[0].tolist() == expected


@pytest.mark.parametrize("record", lines("basis", "project", "reconstruct", "apply", "round"))
def test_operators_match_golden(isa: str, record: str) -> None:
    assert known_answers.answer(record) == record.split(" : ")[1]


def test_known_answers_of_the_package_are_golden() -> None:
    """Each is a line of golden.txt with its checksum alone, and this machine gives it."""
    golden = {line.rsplit(" : ", 1)[0]: line.rsplit(" : ", 1)[1].split()[0] for line in LINES}
    for record in known_answers.RECORDS:
        arguments, checksum = record.split(" : ")
        assert golden[arguments] == checksum
    assert known_answers.wrong("cpu") == []


def test_an_answer_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = known_answers.RECORDS[3][:-1] + "x"
    monkeypatch.setattr(known_answers, "RECORDS", (*known_answers.RECORDS[:3], changed))
    assert known_answers.wrong("cpu") == [changed]
