"""What a run measures: evaluation loss, seconds and bytes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from ferret_ext.federated.data.tokens import IGNORED, Example, collate


@dataclass(frozen=True)
class RoundMetrics:
    """One line of metrics.jsonl. Round 0 is the model before any training; its bytes and seconds are 0.

    clients: who was drawn. left_out: those of them whose training failed and who sent nothing.
    eval_loss: see `evaluation_loss`. train_loss: mean over the other clients of their local training's mean
    loss.
    payload_bytes_up, payload_bytes_down: lengths of the messages that the round's clients sent and received,
    all of them together. model_bytes: all trainable parameters of the model without adapters, what one
    client sends in one direction in full-parameter tuning without projection.
    seconds_local, seconds_project, seconds_rebuild: sums over the round's clients. Clients that share one
    process share one rebuilt model, so a broadcast is applied, and its time counted, once. seconds_server:
    checking, relaying and applying the updates. seconds_eval: the evaluation loss. seconds_generate:
    generating and scoring text. scores: see `scores.SCORES`; empty where no text was generated.
    """

    round: int
    clients: list[int]
    left_out: list[int]
    eval_loss: float
    train_loss: float | None
    payload_bytes_up: int
    payload_bytes_down: int
    model_bytes: int
    seconds_local: float
    seconds_project: float
    seconds_rebuild: float
    seconds_server: float
    seconds_eval: float
    seconds_generate: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds by name: `with watch("local"): ...`, then `watch["local"]`. A reading waits for the GPU."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = _now()
        try:
            yield
        finally:
            self._seconds[name] += _now() - start

    def __getitem__(self, name: str) -> float:
        return self._seconds[name]


def _now() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def evaluation_loss(model: Any, examples: Sequence[Example], batch_size: int, pad_token_id: int) -> float:
    """Mean over the examples of each one's mean cross-entropy in nats over its response tokens.

    Every example counts alike, however long, as with batches of one. Logits are widened to float32, means
    kept in float64; the batch size changes the result by rounding only.
    """
    model.eval()
    means = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_token_id, model.device)
        labels = batch.pop("labels")[:, 1:]
        places = slice(-1 - labels.shape[1], -1)  # from behind, since virtual tokens may stand in front
        logits = model(**batch, use_cache=False).logits[:, places].float()
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        means.append(losses.view_as(labels).double().sum(1) / (labels != IGNORED).sum(1))
    return torch.cat(means).mean().item()
