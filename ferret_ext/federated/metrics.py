"""What a run measures: evaluation loss, seconds and bytes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from ferret_ext.federated import progress
from ferret_ext.federated.data.tokens import IGNORED, Example, collate


@dataclass(frozen=True)
class Rejection:
    """Bytes that a round did not take, whose they were and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What came of a round, before its model is evaluated; the fields have the meaning of `RoundMetrics`'.

    accepted: whose updates count, in their order. updates: SHA-256 of each of these.
    """

    round: int
    clients: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    train_loss: float | None = None
    payload_bytes_up: int = 0
    payload_bytes_down: int = 0
    seconds_local: float = 0.0
    seconds_project: float = 0.0
    seconds_rebuild: float = 0.0
    seconds_server: float = 0.0
    late: int = 0
    epsilon: float | None = None
    delta: float | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds by their names, of which the ledger says nothing."""
        return {name: value for name, value in vars(self).items() if name.startswith("seconds_")}

    @property
    def untold(self) -> Outcome:
        """What may be told where nobody may learn who was drawn."""
        return Outcome(self.round, epsilon=self.epsilon, delta=self.delta)

    def with_evaluation(
        self, loss: float, scores: Mapping[str, float], watch: Stopwatch, model_bytes: int
    ) -> RoundMetrics:
        """The round's metrics, once its model is evaluated."""
        told = {name: value for name, value in vars(self).items() if name not in ("accepted", "updates")}
        return RoundMetrics(
            **told,
            eval_loss=loss,
            scores=dict(scores),
            seconds_eval=watch["eval"],
            seconds_generate=watch["generate"],
            model_bytes=model_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class RoundMetrics:
    """One line of metrics.jsonl. Round 0 is the model before any training; its bytes and seconds are 0.

    clients: who was drawn. left_out: those of them whose training failed and who sent nothing. rejected: what
    others of them sent and the round did not take.
    eval_loss: see `evaluation_loss`. train_loss: mean over the clients that count of their local training's
    mean loss.
    payload_bytes_up, payload_bytes_down: lengths of the messages that the round's clients sent and received,
    all of them together. model_bytes: all trainable parameters of the model without adapters, what one
    client sends in one direction in full-parameter tuning without projection.
    seconds_local, seconds_project, seconds_rebuild: sums over the round's clients. Clients that share one
    process share one rebuilt model, so a broadcast is applied, and its time counted, once. seconds_server:
    checking, relaying and applying the updates. Seconds before the evaluation are 0 where a crash took them.
    late: replies of former rounds that came during this one; 0 where a crash took it. seconds_eval: the
    evaluation loss. seconds_generate: generating and scoring text. scores: see `scores.SCORES`; empty where
    no text was generated. epsilon, delta: of differential privacy, all rounds so far together, see
    `accounting`; None where it is not promised.
    """

    round: int
    clients: list[int]
    left_out: list[int]
    rejected: list[Rejection]
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
    late: int = 0
    epsilon: float | None = None
    delta: float | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> RoundMetrics:
        """The metrics in a line of metrics.jsonl; KeyError or TypeError if it has something else."""
        metrics = cls(**{**row, "rejected": [Rejection(**it) for it in row["rejected"]]})
        optional = ("train_loss", "epsilon", "delta")
        told = {**vars(metrics), **{name: getattr(metrics, name) or 0.0 for name in optional}}
        people = [*told.pop("clients"), *told.pop("left_out"), *(it.client for it in told.pop("rejected"))]
        scores = told.pop("scores").values()
        if any(not isinstance(number, (int, float)) for number in (*people, *scores, *told.values())):
            raise TypeError("expected numbers in a line of metrics.jsonl")
        return metrics


class Stopwatch:
    """Seconds by name: `with watch("local"): ...`, then `watch["local"]`. A reading waits for the GPU, whose
    profilers see the name too."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        progress.report(name)
        start = _now()
        with _marked(name):
            try:
                yield
            finally:
                self._seconds[name] += _now() - start

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds that were measured elsewhere."""
        self._seconds[name] += seconds

    def __getitem__(self, name: str) -> float:
        return self._seconds[name]


def _marked(name: str) -> AbstractContextManager[None]:
    """An NVTX range, which profilers of GPUs show."""
    return torch.cuda.nvtx.range(name) if torch.cuda.is_initialized() else nullcontext()  # type: ignore[no-untyped-call]


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
    starts = range(0, len(examples), batch_size)
    for start in progress.each("eval", starts, len(starts)):
        batch = collate(examples[start : start + batch_size], pad_token_id, model.device)
        labels = batch.pop("labels")[:, 1:]
        places = slice(-1 - labels.shape[1], -1)  # from behind, since virtual tokens may stand in front
        logits = model(**batch, use_cache=False).logits[:, places].float()
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        means.append(losses.view_as(labels).double().sum(1) / (labels != IGNORED).sum(1))
    return torch.cat(means).mean().item()
