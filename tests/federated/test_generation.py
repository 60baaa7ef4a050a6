"""Greedy generation in batches, against one forward pass a token without batch, padding or cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from ferret_ext.federated.client import DivergedError
from ferret_ext.federated.generation import eos_token_ids, generate, pad_left
from ferret_ext.federated.models import byte_tokenizer, positions, tiny_llama

PROMPTS = [
    "Question: 2 + 3?\nAnswer: ",
    "a",
    "Once upon a time, there was",
    "Sort: b a c > ",
    "é",
    "",
    "0" * 60,
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model() -> Any:
    """Random weights, spread far enough for the likeliest byte to depend on the prompt."""
    model = tiny_llama(1)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(8 if param.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """Learned positions, of which there are 32 and no more."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=259,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def ids(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, prompt: list[int], limit: int, stops: set[int]) -> str:
    tokens: list[int] = []
    while len(tokens) < limit:
        sequence = torch.tensor([prompt + tokens])
        logits = model.eval()(sequence, attention_mask=torch.ones_like(sequence)).logits[0, -1]
        if (token := int(logits.argmax())) in stops:
            break
        tokens.append(token)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_generate_is_one_argmax_after_the_other(model: Any, tokenizer: Any, batch_size: int) -> None:
    prompts = ids(tokenizer, PROMPTS)
    outputs = generate(model, tokenizer, prompts, 24, batch_size)
    expected = [one_by_one(model, tokenizer, prompt, 24, {2}) for prompt in prompts]
    assert [output.text for output in outputs] == expected
    assert len(set(expected)) > 3  # not one text for all


def test_generate_stops_at_every_id_that_the_generation_config_names(model: Any, tokenizer: Any) -> None:
    prompts = ids(tokenizer, PROMPTS)
    frequent = [ord(one_by_one(model, tokenizer, prompt, 24, {2})[5]) for prompt in prompts[:2]]
    by_character = {tokenizer.decode([id_]): id_ for id_ in range(3, 259)}
    stops = [by_character[chr(code)] for code in frequent]
    model.generation_config.eos_token_id = stops
    assert eos_token_ids(model, tokenizer) == {2, *stops}
    outputs = generate(model, tokenizer, prompts, 24, 3)
    expected = [one_by_one(model, tokenizer, prompt, 24, {2, *stops}) for prompt in prompts]
    assert [output.text for output in outputs] == expected
    assert [output.stop for output in outputs[:2]] == ["eos", "eos"]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tokenizer) == {2}


def test_generate_takes_nothing_else_from_the_generation_config(model: Any, tokenizer: Any) -> None:
    prompts = ids(tokenizer, PROMPTS)
    plain = generate(model, tokenizer, prompts, 16, 4)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=3, repetition_penalty=5.0, min_new_tokens=9, max_length=20
    )
    model.generation_config = own
    assert generate(model, tokenizer, prompts, 16, 4) == plain
    assert model.generation_config is own
    assert model.generation_config.do_sample is True


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generate_ends_where_the_positions_end(gpt2: Any, tokenizer: Any, batch_size: int) -> None:
    prompts = [[1, *range(40, 40 + length - 1)] for length in (31, 5, 28, 24, 29)]
    outputs = generate(gpt2, tokenizer, prompts, 8, batch_size)
    room = [1, 8, 4, 8, 3]
    expected = [
        one_by_one(gpt2, tokenizer, prompt, limit, {2}) for prompt, limit in zip(prompts, room, strict=True)
    ]
    assert [output.text for output in outputs] == expected
    cut = ["positions", "max_new_tokens", "positions", "max_new_tokens", "positions"]
    assert [output.stop for output in outputs] == cut
    with pytest.raises(ValueError, match="expected prompts of less than 32 tokens, got one of 32"):
        generate(gpt2, tokenizer, [[1] * 32], 8, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_generate_refuses_logits_that_are_not_finite(model: Any, tokenizer: Any, bad: float) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = bad
    with pytest.raises(DivergedError, match=r"generation: expected finite logits, got (nan|inf)"):
        generate(model, tokenizer, ids(tokenizer, ["a"]), 4, 1)


def test_generate_lets_a_model_rule_tokens_out(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logit of -inf means probability 0 and no divergence."""
    forward = model.lm_head.forward

    def letters_only(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = forward(hidden)
        logits[..., [id_ for id_ in range(259) if not tokenizer.decode([id_]).isalpha()]] = float("-inf")
        return logits

    before = generate(model, tokenizer, ids(tokenizer, PROMPTS), 12, 4)
    assert not all(output.text.isalpha() for output in before)
    monkeypatch.setattr(model.lm_head, "forward", letters_only)
    after = generate(model, tokenizer, ids(tokenizer, PROMPTS), 12, 4)
    assert all(output.text.isalpha() and len(output.text) == 12 for output in after)


@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_generate_takes_adapters_and_virtual_tokens(model: Any, tokenizer: Any, kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = {
        "LoraConfig": {"init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]},
        "PromptTuningConfig": {"num_virtual_tokens": 20},
        "PromptEncoderConfig": {"num_virtual_tokens": 20, "encoder_hidden_size": 32},
    }[kind]
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    own = model.generation_config
    prompts = ids(tokenizer, PROMPTS)
    alone = [generate(tuned, tokenizer, [prompt], 12, 1)[0] for prompt in prompts]
    assert generate(tuned, tokenizer, prompts, 12, 4) == alone
    assert [output.text for output in alone] == [
        one_by_one(tuned, tokenizer, prompt, 12, {2}) for prompt in prompts
    ]
    assert model.generation_config is own
    assert positions(tuned) == 512 - settings.get("num_virtual_tokens", 0)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_pad_left_ends_every_prompt_at_the_right_edge(prompts: list[list[int]]) -> None:
    batch = pad_left(prompts, 0, torch.device("cpu"))
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    for prompt, row, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask.bool()].tolist() == row[len(row) - len(prompt) :].tolist() == prompt


def test_generate_tells_stories_in_batches_of_any_size(real_data: Path) -> None:
    folder = real_data / "tiny_llm" / "stories260K-hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ids(tokenizer, ["Once upon a time", "", "Tom had a red ball. He", "The cat", "Lily and Ben"])
    assert eos_token_ids(model, tokenizer) == {1, 2}
    told = [generate(model, tokenizer, prompts, 48, batch_size) for batch_size in (1, 2, 5)]
    assert told[0] == told[1] == told[2]
    assert told[0][1].text.startswith("Once upon a time, there was a little girl named Lily.")
    assert told[0][1].stop == "max_new_tokens"
