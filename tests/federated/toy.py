"""Small models and data that the federated tests share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ferret_ext.federated.data.tokens import Example


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of 5,000 parameters over 32 tokens, embeddings tied."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype)


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Prompts of random tokens whose response repeats the prompt's last token three times."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        prompt = torch.randint(3, 32, (5,), generator=random).tolist()
        made.append(Example((1, *prompt, *[prompt[-1]] * 3, 2), 6))
    return made
