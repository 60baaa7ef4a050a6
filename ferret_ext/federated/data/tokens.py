"""Examples: a prompt and its response as token ids, the prompt's masked out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.formats import Format
from ferret_ext.federated.data.records import Count, place_of

IGNORED = -100  # the label that a loss leaves out


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and response; the first `prompt_length` carry no loss.

    reference: the response's whole text, which generated text is compared with.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    reference: str = ""

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * self.prompt_length + list(self.input_ids[self.prompt_length :])


def tokenise(
    records: Sequence[Mapping[str, Any]],
    format: Format,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int | None = None,
    source: str = "records",
) -> tuple[list[Example], Count]:
    """Examples of at most `max_length` tokens, and what became of the records.

    The prompt is tokenised alone, as it will be when text is generated, and the response, ended by the
    tokenizer's EOS, is appended. Records without a value in a column of the prompt, with an empty response,
    or with a prompt of more than `max_prompt_length` tokens (default: max_length - 1), are dropped. Example i
    comes from record `count.indices[i]`. Raises DataError if none is left.
    """
    longest = min(max_length - 1, max_prompt_length or max_length)
    count, examples = Count(), []
    whole = [index for index, record in enumerate(records) if not _lacks(record, index, format, count)]
    texts = [format.response_of(records[index]) for index in whole]
    prompts = _ids(tokenizer, [format.prompt_of(records[index]) for index in whole], True)
    responses = _ids(tokenizer, texts, False)
    for index, prompt, response, text in zip(whole, prompts, responses, texts, strict=True):
        place = place_of(records[index], index)
        if len(prompt) > longest:
            count.dropped.add("with too long a prompt", place)
            continue
        ids = [*prompt, *response, tokenizer.eos_token_id]
        if len(ids) > max_length:
            count.cut.add("cut to length", place)
        examples.append(Example(tuple(ids[:max_length]), len(prompt), text))
        count.indices.append(index)
    if not examples:
        raise DataError(
            f"data {source}: expected records with a response and a prompt of at most {longest} tokens, "
            f"found none among {len(records)} ({count})"
        )
    return examples, count


def _lacks(record: Mapping[str, Any], index: int, format: Format, count: Count) -> bool:
    """True, and counted, if the record lacks what its prompt or its response is made of."""
    if missing := [column for column in format.prompt_columns if record.get(column) is None]:
        count.dropped.add(f"without {missing[0]}", place_of(record, index))
    elif not format.response_of(record).strip():
        count.dropped.add("with an empty response", place_of(record, index))
    else:
        return False
    return True


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """A batch, padded on the right: input_ids, attention_mask and labels, int64 [batch, longest]."""
    longest = max(len(example.input_ids) for example in examples)

    def rows(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values], device=device)

    return {
        "input_ids": rows([list(example.input_ids) for example in examples], pad_token_id),
        "attention_mask": rows([[1] * len(example.input_ids) for example in examples], 0),
        "labels": rows([example.labels for example in examples], IGNORED),
    }


def _ids(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids
