"""Masking, cutting and dropping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.formats import Format
from ferret_ext.federated.data.tokens import IGNORED, collate, tokenise
from ferret_ext.federated.models import byte_tokenizer

FORM = Format("{q}:", "{a}")
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def test_tokenise_masks_the_prompt_and_ends_the_response(tokenizer: Any) -> None:
    [example], count = tokenise([{"q": "ab", "a": "xyz"}], FORM, tokenizer, 100)
    assert example.input_ids[0] == BOS
    assert example.input_ids[-1] == EOS
    assert example.prompt_length == 4  # BOS, a, b, colon
    assert tokenizer.decode(example.input_ids[4:-1]) == "xyz"
    assert example.labels == [IGNORED] * 4 + list(example.input_ids[4:])
    assert example.reference == "xyz"
    assert (count.kept, count.cut.counts.total()) == (1, 0)


def test_tokenise_cuts_at_max_length(tokenizer: Any) -> None:
    [example], count = tokenise([{"q": "ab", "a": "xyz"}], FORM, tokenizer, 6)
    assert tokenizer.decode(example.input_ids[4:]) == "xy"
    assert example.reference == "xyz"
    assert count.cut.places == {"cut to length": ["record 1"]}


def test_tokenise_counts_what_it_drops(tokenizer: Any) -> None:
    records = [
        {"q": "a", "a": "b"},
        {"q": "a", "a": " \n"},
        {"q": "a", "a": None},
        {"q": "long one", "a": "b"},
        {"q": None, "a": "b"},
    ]
    examples, count = tokenise(records, FORM, tokenizer, 100, max_prompt_length=5)
    assert len(examples) == count.kept == 1
    assert count.indices == [0]
    assert "2 with an empty response dropped (first: record 2)" in str(count)
    assert "1 with too long a prompt dropped (first: record 4)" in str(count)
    assert "1 without q dropped (first: record 5)" in str(count)
    assert count.as_dict()["read"] == 5


def test_tokenise_keeps_room_for_a_response(tokenizer: Any) -> None:
    records = [{"q": "a" * n, "a": "b"} for n in range(20)]
    examples, _ = tokenise(records, FORM, tokenizer, 10)
    assert max(example.prompt_length for example in examples) == 9
    assert all(len(example.input_ids) > example.prompt_length for example in examples)


@pytest.mark.parametrize("record", [{"q": "a", "a": ""}, {"q": "a" * 50, "a": "b"}])
def test_tokenise_refuses_data_of_which_nothing_is_left(tokenizer: Any, record: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"data my.jsonl: expected records .*, found none among 3"):
        tokenise([record] * 3, FORM, tokenizer, 20, source="my.jsonl")


@given(st.text(max_size=40), st.text(min_size=1, max_size=40).filter(str.strip))
def test_tokenise_gives_back_any_text(prompt: str, response: str) -> None:
    tokenizer = byte_tokenizer()
    [example], _ = tokenise([{"q": prompt, "a": response}], FORM, tokenizer, 1000)
    ids = list(example.input_ids)
    assert tokenizer.decode(ids[1 : example.prompt_length]) == f"{prompt}:"
    assert tokenizer.decode(ids[example.prompt_length : -1]) == response


def test_collate_pads_on_the_right(tokenizer: Any) -> None:
    examples, _ = tokenise([{"q": "a", "a": "b"}, {"q": "abc", "a": "bcd"}], FORM, tokenizer, 100)
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 9)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    assert batch["input_ids"][0, 5:].tolist() == [tokenizer.pad_token_id] * 4
    assert batch["labels"][0].tolist() == [*examples[0].labels, *[IGNORED] * 4]
