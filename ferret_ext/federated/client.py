"""A client's local training: T steps of a first-order optimiser on its own examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ferret_ext.federated.config import TrainingConfig
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.tokens import Example, collate


class DivergedError(RuntimeError):
    """Training whose loss or weights are no longer finite."""


@dataclass(frozen=True)
class LocalTrainer:
    """Trains any causal language model of transformers in place; frozen parameters stay as they are."""

    config: TrainingConfig
    pad_token_id: int

    def train(self, model: Any, examples: Sequence[Example], seed: int) -> float:
        """T optimiser steps over the examples, in an order drawn from `seed`; the mean loss of all batches.

        A batch's loss is the mean over its response tokens, a step's gradient the mean over its batches.
        Dropout draws from `seed` too. One example is enough: it is taken again and again. Raises DataError
        where there is none, DivergedError where the loss or a weight is no longer finite.
        """
        if not examples:
            raise DataError("expected at least one example to train on, got none")
        config = self.config
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(params, config)
        batches = endless_batches(len(examples), config.per_device_train_batch_size, seed)
        total = 0.0
        model.train()
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for _ in range(config.max_steps):
                optimizer.zero_grad(set_to_none=True)
                for _ in range(config.gradient_accumulation_steps):
                    batch = collate([examples[i] for i in next(batches)], self.pad_token_id, model.device)
                    loss = model(**batch, use_cache=False).loss
                    (loss / config.gradient_accumulation_steps).backward()
                    total += loss.item()
                if config.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(params, config.max_grad_norm)
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(total) or not all(param.isfinite().all() for param in params):
            raise DivergedError(
                "training diverged, loss or weights are not finite; lower training.learning_rate"
            )
        return total / (config.max_steps * config.gradient_accumulation_steps)


def make_optimizer(params: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The local optimiser, fresh: a client carries no state from round to round."""
    if config.optim == "adam":
        return torch.optim.Adam(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(params, lr=config.learning_rate, weight_decay=config.weight_decay)


def endless_batches(num_examples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices: every example once in a shuffled order, then again in another."""
    random = np.random.Generator(np.random.PCG64(seed))
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += random.permutation(num_examples).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
