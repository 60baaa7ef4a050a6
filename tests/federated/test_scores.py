"""Scores with known answers, most of them counted by hand."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferret_ext.federated import scores
from ferret_ext.federated.config import ScoreName
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.scores import Score, gsm8k_answer, gsm8k_exact_match
from ferret_ext.federated.settings import ConfigError

ROUGE = ("rouge-l", "rougeL", "rougeL-stem")


@pytest.fixture(scope="module")
def rouge() -> dict[str, Score]:
    pytest.importorskip("rouge")
    pytest.importorskip("rouge_score")
    return scores.load(ROUGE)


def test_every_score_can_be_configured() -> None:
    assert set(get_args(ScoreName)) == set(scores.SCORES)


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("a b c", "a b c", (1, 1, 1)),
        ("", "a b", (0, 0, 0)),
        # the, cat, on, the, mat are 5 of 6 and 6 words; each word counted once, 4 of 5 and 5
        ("the cat is on the mat", "the cat sat on the mat", (0.8, 5 / 6, 5 / 6)),
        # 5 of 6 and 6 words again; each word counted once, 5 of 6 and 5
        ("the cat sat on a mat", "the cat sat on the mat", (10 / 11, 5 / 6, 5 / 6)),
        # rouge compares sentences with sentences, rouge_score the words "it ran" and "the cat sat" in order
        ("the cat sat. it ran.", "it ran. the cat sat.", (1, 0.6, 0.6)),
        # only rouge_score takes capitals and punctuation away; rouge ends sentences at periods
        ("The cat sat!", "the cat sat.", (1 / 3, 1, 1)),
        ("cats sat", "cat sat", (0.5, 0.5, 1)),
        ("x", "y", (0, 0, 0)),
    ],
)
def test_rouge_l_of_both_packages(
    rouge: dict[str, Score], output: str, reference: str, expected: tuple[float, ...]
) -> None:
    got = [rouge[name](output, reference) for name in ROUGE]
    assert got == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("nothing", ["", " ", "...", " . \n"])
def test_rouge_l_without_a_word_is_0(rouge: dict[str, Score], nothing: str) -> None:
    for score in rouge.values():
        assert score(nothing, "a word. ") == score("a word. ", nothing) == score(nothing, nothing) == 0


def test_rouge_l_takes_long_texts_without_a_period(rouge: dict[str, Score]) -> None:
    """The package's search calls itself once a word."""
    limit = sys.getrecursionlimit()
    text = " ".join(f"w{i}" for i in range(limit + 200))
    assert rouge["rouge-l"](text, text) == pytest.approx(1)
    assert sys.getrecursionlimit() == limit


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12)


@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(
    rouge: dict[str, Score], output: list[str], reference: list[str]
) -> None:
    lengths = [[0] * (len(reference) + 1) for _ in range(len(output) + 1)]
    for i, left in enumerate(output):
        for j, right in enumerate(reference):
            up, side, corner = lengths[i][j + 1], lengths[i + 1][j], lengths[i][j]
            lengths[i + 1][j + 1] = corner + 1 if left == right else max(up, side)
    f1 = 2 * lengths[-1][-1] / (len(output) + len(reference))
    assert rouge["rougeL"](" ".join(output), " ".join(reference)) == pytest.approx(f1)
    if len(set(output)) == len(output) and len(set(reference)) == len(reference):
        assert rouge["rouge-l"](" ".join(output), " ".join(reference)) == pytest.approx(f1, abs=1e-7)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 2 = 3\n#### 3", 3),
        ("#### 1,234,567", 1234567),
        ("####-5.", -5),
        ("#### −5", -5),
        ("#### $18.00", 18),
        ("#### -$18", -18),
        ("#### $-18", -18),
        ("#### .5", Decimal("0.5")),
        ("#### 18 dollars", 18),
        ("#### 70%", 70),
        ("#### 3\n\nQuestion: 2 + 2?\nAnswer: #### 4", 3),
        ("#### so\n#### 4", 4),
        ("#####3", 3),
        ("3", None),
        ("### 3", None),
        ("#### three", None),
        ("####", None),
        ("", None),
    ],
)
def test_gsm8k_answer_is_the_number_behind_the_marker(text: str, answer: Decimal | int | None) -> None:
    assert gsm8k_answer(text) == answer


def test_gsm8k_exact_match_compares_numbers() -> None:
    assert gsm8k_exact_match("so #### 1234.0", "x\n#### 1,234") == 1
    assert gsm8k_exact_match("so #### 1235", "x\n#### 1,234") == 0
    assert gsm8k_exact_match("it is 1234", "x\n#### 1,234") == 0
    assert gsm8k_exact_match("", "#### 0") == 0
    assert gsm8k_exact_match("#### -7", "#### 7") == 0
    with pytest.raises(DataError, match="gsm8k-exact-match: expected references with a number after ####"):
        gsm8k_exact_match("#### 1", "no marker here")


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["", "$"]), st.sampled_from(["", ".", ".0", " apples"])
)
def test_gsm8k_answer_reads_any_integer(number: int, currency: str, after: str) -> None:
    sign = "-" if number < 0 else ""
    assert gsm8k_answer(f"steps\n#### {sign}{currency}{abs(number):,}{after}") == number


@pytest.mark.parametrize(("name", "module"), [("rouge-l", "rouge"), ("rougeL", "rouge_score")])
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    for loaded in [*sys.modules, module, f"{module}.rouge_scorer"]:
        if loaded.partition(".")[0] == module:
            monkeypatch.setitem(sys.modules, loaded, None)
    message = rf"{name}: expected the package {module}, .*pip install '\.\[scores\]'"
    with pytest.raises(ConfigError, match=message):
        scores.load([name])
    assert scores.load(["gsm8k-exact-match"])
