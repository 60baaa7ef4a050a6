"""Examples: a prompt and its response as token ids, the prompt's masked out of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.formats import Format
from ferret_ext.federated.data.sources import Record

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


@dataclass
class Count:
    """What became of the records."""

    kept: int = 0
    cut: int = 0  # kept, but cut at max_length
    empty_response: int = 0
    long_prompt: int = 0

    def __str__(self) -> str:
        dropped = {"with an empty response": self.empty_response, "with too long a prompt": self.long_prompt}
        parts = [f"{self.kept} records, {self.cut} cut to length"]
        parts += [f"{number} {what} dropped" for what, number in dropped.items() if number]
        return ", ".join(parts)


def tokenise(
    records: Sequence[Record],
    format: Format,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int | None = None,
    source: str = "records",
) -> tuple[list[Example], Count]:
    """Examples of at most `max_length` tokens, and what was dropped.

    The prompt is tokenised alone, as it will be when text is generated, and the response, ended by the
    tokenizer's EOS, is appended. Records with an empty response, or whose prompt has more than
    `max_prompt_length` tokens (default: max_length - 1), are dropped. Raises DataError if none is left.
    """
    longest = min(max_length - 1, max_prompt_length or max_length)
    count, examples = Count(), []
    filled = [record for record in records if format.response_of(record).strip()]
    count.empty_response = len(records) - len(filled)
    texts = [format.response_of(record) for record in filled]
    prompts = _ids(tokenizer, [format.prompt_of(record) for record in filled], add_special_tokens=True)
    responses = _ids(tokenizer, texts, add_special_tokens=False)
    for prompt, response, text in zip(prompts, responses, texts, strict=True):
        if len(prompt) > longest:
            count.long_prompt += 1
            continue
        ids = [*prompt, *response, tokenizer.eos_token_id]
        count.cut += len(ids) > max_length
        examples.append(Example(tuple(ids[:max_length]), len(prompt), text))
    count.kept = len(examples)
    if not examples:
        raise DataError(
            f"data {source}: expected records with a response and a prompt of at most {longest} tokens, "
            f"found none among {len(records)} ({count})"
        )
    return examples, count


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
