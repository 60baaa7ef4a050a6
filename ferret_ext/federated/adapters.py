"""Adapters of PEFT: a few trainable parameters on a frozen model, which any algorithm then tunes alone.

FedIT, FedPrompt and FedPTuning are FedAvg over such adapters, with Adam as local optimiser (FedIT-SGD: SGD).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ferret_ext.federated.config import AdapterConfig, SimulationConfig
from ferret_ext.federated.settings import ConfigError

PUBLISHED: dict[str, tuple[Any, Any]] = {  # algorithm -> adapter.type, training.optim
    "fedit": ("lora", "adam"),
    "fedit-sgd": ("lora", "sgd"),
    "fedprompt": ("prompt-tuning", "adam"),
    "fedptuning": ("p-tuning", "adam"),
}
PLAIN: tuple[Any, Any] = ("none", "sgd")  # of all others


def resolve(config: SimulationConfig) -> SimulationConfig:
    """The config with its algorithm's adapter and optimiser, where it says auto. Raises ConfigError."""
    kind, optim = PUBLISHED.get(config.algorithm, PLAIN)
    if config.algorithm in PUBLISHED and config.adapter.type not in ("auto", kind):
        raise ConfigError(
            f"adapter.type: expected {kind}, which {config.algorithm} tunes, got {config.adapter.type}"
        )
    adapter, training = config.adapter, config.training
    if adapter.type == "auto":
        adapter = dataclasses.replace(adapter, type=kind)
    if training.optim == "auto":
        training = dataclasses.replace(training, optim=optim)
    return dataclasses.replace(config, adapter=adapter, training=training)


def attach(model: Any, config: AdapterConfig, seed: int) -> Any:
    """The model with its adapter, whose first weights follow from the seed; the model itself for "none".

    The adapter's weights are float32 where the model's are 16 bits wide. Raises ConfigError.
    """
    if config.type == "none":
        return model
    try:
        import peft
    except ImportError:
        raise ConfigError(
            f"adapter.type: expected PEFT to be installed for {config.type}, got none; "
            "in the source tree, pip install '.[peft]'"
        ) from None
    task = peft.TaskType.CAUSAL_LM
    if config.type == "lora":
        settings: Any = peft.LoraConfig(
            task_type=task,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",  # all projections of attention and MLP, whatever their names
        )
    elif config.type == "prompt-tuning":
        settings = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=config.num_virtual_tokens)
    else:
        settings = peft.PromptEncoderConfig(
            task_type=task,
            num_virtual_tokens=config.num_virtual_tokens,
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=config.encoder_hidden_size or model.get_input_embeddings().embedding_dim,
            encoder_dropout=config.encoder_dropout,
        )
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings)


def attach_blank(model: Any, config: SimulationConfig) -> Any:
    """A model on the meta device (`models.skeleton`) with its adapter there. Raises ConfigError."""
    with torch.device("meta"):
        return attach(model, config.adapter, seed=0)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder for transformers; one with the adapter, for PEFT, where it cannot be merged.

    LoRA is merged into the weights. A prompt stays an adapter, which names the model that it belongs to; a
    model that was made here and has no name is saved beside it, in folder/base.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is not None and config.is_prompt_learning:
        if not config.base_model_name_or_path:
            base = folder / "base"
            model.get_base_model().save_pretrained(base)
            config.base_model_name_or_path = str(base)
        if Path(config.base_model_name_or_path).is_dir():  # found from any working directory
            config.base_model_name_or_path = str(Path(config.base_model_name_or_path).absolute())
    elif config is not None:
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
