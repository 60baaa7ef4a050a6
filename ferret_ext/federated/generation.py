"""Greedy text from any causal language model of transformers, in batches of prompts padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from ferret_ext.federated.client import DivergedError
from ferret_ext.federated.models import positions, virtual_tokens

Prompt = Sequence[int]  # token ids


@dataclass(frozen=True)
class Output:
    """A generated text without its prompt, and what ended it: an EOS token, or one of two limits."""

    text: str
    stop: Literal["eos", "max_new_tokens", "positions"]


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[Output]:
    """The most probable token at each step, up to an EOS token or `max_new_tokens` of them, for each prompt.

    A text ends at the tokenizer's EOS and at all ids that the model's generation config names, and where the
    model has no positions left; nothing else of that config counts (sampling, beams, penalties). The batch
    size changes logits by rounding only, and so leaves a text as it is unless two tokens are as good as tied.
    Raises ValueError for a prompt that leaves no position, DivergedError where logits are not finite.
    """
    room = positions(model)
    limits = [max_new_tokens if room is None else min(max_new_tokens, room - len(p)) for p in prompts]
    if any(limit < 1 for limit in limits):
        longest = max(map(len, prompts))
        raise ValueError(f"generate: expected prompts of less than {room} tokens, got one of {longest}")
    stops = eos_token_ids(model, tokenizer)
    sizes = [(limit, len(prompt)) for limit, prompt in zip(limits, prompts, strict=True)]
    outputs: dict[int, Output] = {}
    for batch in _batches(sizes, batch_size, may_pad=not virtual_tokens(model)):
        limit = limits[batch[0]]
        inputs = pad_left([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        rows = _greedy(model, inputs, limit, sorted(stops), tokenizer.pad_token_id)
        for index, row in zip(batch, rows, strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cut: Any = "max_new_tokens" if limit == max_new_tokens else "positions"
            outputs[index] = Output(text, cut if end is None else "eos")
    return [outputs[index] for index in range(len(prompts))]


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's EOS, which training puts behind every response, and those of the generation config."""
    named = model.generation_config.eos_token_id
    ids = named if isinstance(named, (list, tuple)) else [named]
    return {tokenizer.eos_token_id, *(id_ for id_ in ids if id_ is not None)}


def pad_left(prompts: Sequence[Prompt], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [batch, longest]; every prompt ends at the right edge."""
    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _batches(sizes: Sequence[tuple[int, int]], batch_size: int, may_pad: bool) -> Iterator[list[int]]:
    """Indices of equal limits, so that no row runs past its own; similar lengths beside each other.

    sizes: limit and length of each. may_pad: false for PEFT's virtual tokens, which stand before the padding
    and count it as distance; then lengths are equal too.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for _, group in groupby(order, key=lambda index: sizes[index] if not may_pad else sizes[index][0]):
        alike = list(group)
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


@torch.no_grad()
def _greedy(
    model: Any, inputs: dict[str, Tensor], limit: int, stops: list[int], pad_token_id: int
) -> list[list[int]]:
    """The new tokens of each row; a row that has ended is filled with padding."""
    from transformers import GenerationConfig, LogitsProcessorList

    plain = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        eos_token_id=stops,
        pad_token_id=pad_token_id,
        use_cache=not virtual_tokens(model),  # with a cache, PEFT 0.21 and transformers 5.24 go on otherwise
    )
    model.eval()
    with _generation_config(model, plain):
        ids = model.generate(
            **inputs, generation_config=plain, logits_processor=LogitsProcessorList([_require_finite])
        )
    new: list[list[int]] = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return new


def _require_finite(input_ids: Tensor, logits: Tensor) -> Tensor:
    """The logits [batch, vocabulary] as they are; a -inf among them only rules a token out."""
    best = logits.amax(-1)  # NaN where there is one
    if not best.isfinite().all():
        bad = best[~best.isfinite()][0].item()
        raise DivergedError(f"generation: expected finite logits, got {bad}")
    return logits


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """`config` in the place of the model's own, out of which `generate` fills what `config` leaves open."""
    holders = [part for part in model.modules() if hasattr(part, "generation_config")]
    before = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = config
    try:
        yield
    finally:
        for part, own in zip(holders, before, strict=True):
            part.generation_config = own
