"""A client's local training: steps of a first-order optimiser on its own examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ferret_ext.federated import progress
from ferret_ext.federated.config import TrainingConfig
from ferret_ext.federated.data.tokens import Example, collate
from ferret_ext.federated.settings import ConfigError

Batch = list[int]  # indices of examples
OptimizerStates = dict[int, dict[int, dict[str, Any]]]  # by client, parameter and name


class LocalFailure(RuntimeError):
    """Why a client has no update to send in a round; the others go on without it."""


class DivergedError(LocalFailure):
    """Training whose loss or weights are no longer finite."""


@dataclass(frozen=True)
class LocalTrainer:
    """Trains any causal language model of transformers in place; frozen parameters stay as they are.

    One trainer serves all clients of a process. `states` has the optimiser's state of each client that has
    trained, on the CPU, where `training.keep_state` asks for it.
    """

    config: TrainingConfig
    pad_token_id: int
    states: OptimizerStates = field(default_factory=dict, repr=False)

    def train(self, model: Any, examples: Sequence[Example], seed: int, client: int = 0) -> float:
        """The round's optimiser steps over the examples; the mean loss of all batches.

        A batch's loss is the mean over its response tokens, a step's gradient the mean over its batches.
        The order of the examples and dropout are drawn from `seed`. Raises LocalFailure where there are no
        examples, DivergedError where the loss or a weight is no longer finite.
        """
        if not examples:
            raise LocalFailure("it holds no examples")
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(self._held(params), self.config)
        if client in self.states:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self.states.pop(client)})
        _prepare(model, self.config)
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(self._draws(seed))
            batches_of = steps(len(examples), self.config, seed)
            losses = [
                self._step(model, params, optimizer, [[examples[i] for i in batch] for batch in batches])
                for batches in progress.each("local", batches_of, count_steps(len(examples), self.config))
            ]
        optimizer.zero_grad(set_to_none=True)
        if not self._all_finite(params):
            raise DivergedError(DIVERGED)
        if self.config.keep_state:
            self.states[client] = _on_cpu(optimizer.state_dict()["state"])
        batches_done = sum(len(of_step) for of_step in losses)
        return math.fsum(loss for of_step in losses for loss in of_step) / batches_done

    def _held(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """What the optimiser changes in this process."""
        return params

    def _draws(self, seed: int) -> int:
        """The seed of dropout."""
        return seed

    def _all_finite(self, params: list[nn.Parameter]) -> bool:
        return all(param.isfinite().all() for param in params)

    def _step(
        self, model: Any, params: list[nn.Parameter], optimizer: Any, batches: Sequence[Sequence[Example]]
    ) -> list[float]:
        """One optimiser step; the loss of each batch."""
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for examples in batches:
            loss = model(**collate(examples, self.pad_token_id, model.device), use_cache=False).loss
            (loss / len(batches)).backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise DivergedError(DIVERGED)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, self.config.max_grad_norm)
        optimizer.step()
        return losses


DIVERGED = (
    "training diverged, loss or weights are not finite; lower training.learning_rate or server_learning_rate"
)


def make_optimizer(params: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The local optimiser, its state empty. Raises ConfigError where it cannot work in the weights' dtype."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optim in ("auto", "sgd"):
        return torch.optim.SGD(params, lr=rate, momentum=config.momentum, weight_decay=decay)
    if any(param.dtype == torch.float16 for param in params):
        raise ConfigError(
            f"training.optim: expected sgd for float16 weights, got {config.optim}, whose second moments "
            "underflow in it; bfloat16 and float32 have the range"
        )
    kind = torch.optim.Adam if config.optim == "adam" else torch.optim.AdamW
    betas = (config.adam_beta1, config.adam_beta2)
    return kind(params, lr=rate, betas=betas, eps=config.adam_epsilon, weight_decay=decay)


def steps(num_examples: int, config: TrainingConfig, seed: int) -> Iterator[list[Batch]]:
    """The batches of each optimiser step of a round.

    By max_steps, all steps and batches are full, and the examples come round again as often as needed. By
    num_train_epochs, every pass ends with a smaller batch where the examples do not fill it, and the last
    step has the batches that are left.
    """
    size, group = config.per_device_train_batch_size, config.gradient_accumulation_steps
    drawn = endless_batches if config.num_train_epochs is None else passes
    batches = islice(drawn(num_examples, size, seed), _count_batches(num_examples, config))
    while step := list(islice(batches, group)):
        yield step


def count_steps(num_examples: int, config: TrainingConfig) -> int:
    """How many `steps` there are."""
    return math.ceil(_count_batches(num_examples, config) / config.gradient_accumulation_steps)


def _count_batches(num_examples: int, config: TrainingConfig) -> int:
    if config.num_train_epochs is None:
        return config.max_steps * config.gradient_accumulation_steps
    return math.ceil(config.num_train_epochs * math.ceil(num_examples / config.per_device_train_batch_size))


def endless_batches(num_examples: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Full batches of indices: every example once in a shuffled order, then again in another."""
    waiting: list[int] = []
    for order in _orders(num_examples, seed):
        waiting += order
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]


def passes(num_examples: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of one pass after another; the last of a pass may be smaller."""
    for order in _orders(num_examples, seed):
        for start in range(0, num_examples, batch_size):
            yield order[start : start + batch_size]


def _orders(num_examples: int, seed: int) -> Iterator[list[int]]:
    random = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield random.permutation(num_examples).tolist()


def _prepare(model: Any, config: TrainingConfig) -> None:
    """Puts the model into training mode, checkpointed and compiled as configured; both stay with it."""
    model.train()
    if config.gradient_checkpointing and not any(
        getattr(part, "gradient_checkpointing", False) for part in model.modules()
    ):
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"training.gradient_checkpointing: expected false: {error}") from None
    if config.torch_compile and model._compiled_call_impl is None:
        model.compile()


def _on_cpu(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """An optimiser's state on the CPU; a new optimiser moves it to its parameters' device again."""

    def moved(value: Any) -> Any:
        return value.cpu() if isinstance(value, torch.Tensor) else value

    return {index: {name: moved(value) for name, value in values.items()} for index, values in state.items()}
