"""Models and tokenizers: any causal language model of transformers, and a small Llama made here."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ferret_ext.federated import model_files
from ferret_ext.federated.settings import ConfigError

_log = logging.getLogger(__name__)
TINY_LLAMA = "builtin:tiny-llama"
DAMAGED = (SafetensorError, UnpicklingError, RuntimeError, EOFError)  # what broken weight files raise


def load(
    name: str, dtype: str, device: torch.device, seed: int, *, allow_pickle: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer from a folder, the hub, or "builtin:tiny-llama" with weights drawn from `seed`.

    dtype: "auto" (as stored) or the name of a torch dtype. allow_pickle: takes weights in other files than
    those of safetensors too. Code that comes with a model is never run. Raises ConfigError.
    """
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == TINY_LLAMA:
        model, tokenizer = tiny_llama(seed), byte_tokenizer()
        model = model if wanted == "auto" else model.to(wanted)
    else:
        model, tokenizer = _pretrained(name, wanted, allow_pickle)
    _check(name, model, tokenizer)
    return model.to(device), tokenizer


def skeleton(name: str, dtype: str) -> Any:
    """What `load` gives as model, on the meta device: shapes and dtypes, and no weights. Raises ConfigError.

    Of a model on the hub only the config is fetched. Of a folder that PEFT has saved it is the base model.
    """
    if name == TINY_LLAMA:
        with torch.device("meta"):
            model = tiny_llama(0)
        return model if dtype == "auto" else model.to(getattr(torch, dtype))
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _source(name, allow_pickle=True)  # no weights are opened
    try:
        if (Path(source) / model_files.ADAPTER).is_file():
            from peft import PeftConfig

            source = str(PeftConfig.from_pretrained(source).base_model_name_or_path)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, ImportError, *DAMAGED) as error:
        raise _no_model(name, error) from None


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes a GPU where there is one. A GPU becomes the current one, whose
    times and memory are measured. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        known = f"one of {count} visible GPUs" if count else "auto or cpu, as this torch sees no GPU"
        raise ConfigError(f"device: expected {known}, got {name!r}")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def positions(model: Any) -> int | None:
    """The longest sequence that the model takes, prompt and response together; None where it has no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit and limit - virtual_tokens(model)


def max_length(model: Any, wanted: int) -> int:
    """Tokens of prompt and response together: as many as wanted, or as the model takes."""
    limit = positions(model)
    return wanted if limit is None else min(wanted, limit)


def virtual_tokens(model: Any) -> int:
    """How many trained tokens PEFT's prompt tuning and p-tuning put before every prompt; else 0."""
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


def trainable_bytes(model: nn.Module) -> int:
    """Bytes of all trainable parameters: what sending the whole model takes."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def tiny_llama(seed: int) -> Any:
    """A Llama of 0.1 million parameters over bytes, its weights drawn from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def byte_tokenizer() -> Any:
    """One token a byte, after <pad>, <s> and </s>; a text begins with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def _pretrained(name: str, dtype: Any, allow_pickle: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _source(name, allow_pickle)
    how = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": None if allow_pickle else True}
    try:
        if (Path(source) / model_files.ADAPTER).is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(source, **how)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, **how)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, *DAMAGED) as error:
        raise _no_model(name, error) from None
    return model, tokenizer


def _source(name: str, allow_pickle: bool) -> str:
    """The folder, or the name itself for the hub. Raises ConfigError."""
    folder = Path(name).expanduser()
    if name.startswith("builtin:"):
        raise ConfigError(f"model: expected {TINY_LLAMA}, got {name!r}")
    if folder.is_file():
        raise ConfigError(
            f"model: expected a folder or a hub name, got {name!r}, which is a file; give its folder, "
            f"{str(folder.parent)!r}"
        )
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise ConfigError(f"model: expected a folder or a hub name, got {name!r}, which does not exist")
    if folder.is_dir():
        model_files.check(folder, allow_pickle)
        return str(folder)
    _log.warning("model: %r is no folder here; asking the Hugging Face hub for it", name)
    return name


def _no_model(name: str, error: Exception) -> ConfigError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    where = "" if Path(name).expanduser().is_dir() else ", which is no folder here"
    if isinstance(error, OSError) and "safetensors" in reason:
        reason = f"{reason}; of weights in other files: {model_files.CONVERT}"
    if "trust_remote_code" in str(error):
        reason = "it comes with code of its own, which is never run"
    return ConfigError(
        f"model: expected a causal language model with its tokenizer at {name!r}{where}: {reason}"
    )


def _check(name: str, model: Any, tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model {name}: expected a tokenizer with an EOS token, got none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model {name}: expected a tokenizer of at most {rows} tokens, got {len(tokenizer)}"
        )
    is_adapter = hasattr(model, "peft_config")  # PEFT opens prompts for evaluation only
    if not is_adapter and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model {name}: expected trainable parameters, got none")
