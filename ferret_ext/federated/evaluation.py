"""What a model is worth on held-out examples: its loss, and scores of the text that it generates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ferret_ext.federated.client import DivergedError
from ferret_ext.federated.config import EvaluationConfig
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.generation import generate
from ferret_ext.federated.metrics import Stopwatch, evaluation_loss
from ferret_ext.federated.scores import Score


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl: a prompt, what was generated for it, and how that scores.

    index: the example's place among those evaluated. stop: what ended the output, see `generation.Output`.
    """

    index: int
    prompt: str
    reference: str
    output: str
    stop: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """A model's mean loss over its records and, where text was generated, mean scores and the samples."""

    loss: float
    records: int
    scores: dict[str, float]
    samples: list[Sample]


class Evaluator:
    """Evaluates one model after the other on the same examples, as `config` says."""

    def __init__(
        self,
        config: EvaluationConfig,
        examples: Sequence[Example],
        tokenizer: Any,
        scores: Mapping[str, Score],
    ) -> None:
        """scores: see `scores.load`. Raises DataError where one cannot use the examples' references."""
        self._config = config
        self._examples = examples
        self._tokenizer = tokenizer
        self._scores = scores
        self._generated = examples[: config.max_generated_samples]
        for example in self._generated:  # found out now, not after the training
            self._score("", example.reference)

    def after_round(self, rounds: int, round_: int, model: Any, watch: Stopwatch) -> Evaluation:
        """The evaluation after a round of so many: the loss always, scores where the config asks for them."""
        every = self._config.generate_every
        return self.evaluate(model, watch, round_ == rounds or (every > 0 and round_ % every == 0))

    def evaluate(self, model: Any, watch: Stopwatch, with_scores: bool = True) -> Evaluation:
        """The loss and, if asked for, the scores. Raises DivergedError where numbers are not finite."""
        with watch("eval"):
            size, pad = self._config.per_device_eval_batch_size, self._tokenizer.pad_token_id
            loss = evaluation_loss(model, self._examples, size, pad)
        if not math.isfinite(loss):
            raise DivergedError(f"expected a finite evaluation loss, got {loss}")
        if not with_scores or not self._scores:
            return Evaluation(loss, len(self._examples), {}, [])
        with watch("generate"):
            samples = self._samples(model)
        means = {name: fmean(sample.scores[name] for sample in samples) for name in self._scores}
        return Evaluation(loss, len(self._examples), means, samples)

    def _samples(self, model: Any) -> list[Sample]:
        config, decode = self._config, self._tokenizer.decode
        prompts = [example.input_ids[: example.prompt_length] for example in self._generated]
        outputs = generate(
            model, self._tokenizer, prompts, config.max_new_tokens, config.per_device_eval_batch_size
        )
        return [
            Sample(
                index,
                decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                example.reference,
                output.text,
                output.stop,
                self._score(output.text, example.reference),
            )
            for index, (example, prompt, output) in enumerate(
                zip(self._generated, prompts, outputs, strict=True)
            )
        ]

    def _score(self, output: str, reference: str) -> dict[str, float]:
        return {name: score(output, reference) for name, score in self._scores.items()}


def describe(means: Mapping[str, float], samples: Sequence[Sample]) -> str:
    """The scores in words, and how many of the texts a limit cut off."""
    stops = Counter(sample.stop for sample in samples)
    scores = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
    return (
        f"{scores} over {len(samples)} generated texts, {stops['max_new_tokens']} cut at max_new_tokens, "
        f"{stops['positions']} at the model's last position"
    )
