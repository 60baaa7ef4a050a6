"""Prompts and responses from records."""

from __future__ import annotations

import pytest

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.formats import FORMATS, choose

GSM8K = {"question": "2 + {3}?", "answer": "#### 5"}
ALPACA = {"instruction": "Sort.", "input": "b a", "output": "a b"}
DOLLY = {"instruction": "Sort.", "context": "", "response": "a b", "category": "open_qa"}


def test_gsm8k_prompt_is_the_question_and_keeps_braces() -> None:
    assert FORMATS["gsm8k"].prompt_of(GSM8K) == "Question: 2 + {3}?\nAnswer: "
    assert FORMATS["gsm8k"].response_of(GSM8K) == "#### 5"


def test_alpaca_prompt_has_an_input_part_only_where_there_is_an_input() -> None:
    with_input = FORMATS["alpaca"].prompt_of(ALPACA)
    without = FORMATS["alpaca"].prompt_of({**ALPACA, "input": " "})
    assert with_input.endswith("### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:")
    assert without.endswith("### Instruction:\nSort.\n\n### Response:")
    assert "### Input" not in without
    assert FORMATS["alpaca"].prompt_of({**ALPACA, "input": None}) == without
    assert FORMATS["dolly"].prompt_of(DOLLY) == without


@pytest.mark.parametrize(("record", "name"), [(GSM8K, "gsm8k"), (ALPACA, "alpaca"), (DOLLY, "dolly")])
def test_auto_goes_by_the_columns(record: dict[str, str], name: str) -> None:
    assert choose("auto", None, None, [record], "data") is FORMATS[name]


def test_a_line_may_end_as_it_is_typed_in_a_shell() -> None:
    form = choose("auto", r"Q: {question}\n\nA: ", "{answer}\n", [GSM8K], "x")
    assert form.prompt_of(GSM8K) == "Q: 2 + {3}?\n\nA: "
    assert form.response_of(GSM8K) == "#### 5\n"


def test_own_templates_take_any_column() -> None:
    own = choose("auto", "Q: {q} ", "{a}!", [{"q": 7, "a": "b"}], "data")
    assert own.prompt_of({"q": 7, "a": "b"}) == "Q: 7 "
    assert own.response_of({"q": 7, "a": "b"}) == "b!"


@pytest.mark.parametrize(
    ("name", "prompt", "response", "message"),
    [
        ("gsm8k", None, None, "expected the column question, answer, found instruction, out"),
        ("auto", None, None, "question, answer .gsm8k.;.* found instruction, out"),
        ("auto", "{text}", "{out}", "expected the column text, found"),
        ("auto", "{text", "{out}", "is no template"),
        ("auto", "{}", "{out}", r"expected {column} in '{}', got {}"),
        ("auto", "{out.__class__}", "{out}", "expected {column}"),
    ],
)
def test_choose_says_what_does_not_fit(
    name: str, prompt: str | None, response: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choose(name, prompt, response, [{"instruction": "a", "out": "b"}], "data")
