"""A model evaluated on its own, outside of any run."""

from __future__ import annotations

from pathlib import Path

from ferret_ext.federated import models, scores
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.evaluation import Evaluation, Evaluator
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.run import Speaker, reproducible
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.settings import Setting


def evaluate(config: SimulationConfig, speaker: Speaker) -> Evaluation:
    """Evaluates `config.model` as a run with this config evaluates its global model.

    Raises ConfigError, DataError and DivergedError.
    """
    measures = scores.load(config.evaluation.scores)
    with reproducible(config.full_determinism, config.num_threads):
        device = models.pick_device(config.device)
        seed, allow_pickle = derive(config.seed, "model"), config.allow_pickle
        model, tokenizer = models.load(config.model, config.dtype, device, seed, allow_pickle=allow_pickle)
        max_length = models.max_length(model, config.dataset.max_length)
        held = loading.load_held(config, tokenizer, max_length, speaker.say)
        evaluator = Evaluator(config.evaluation, held, tokenizer, measures)
        return evaluator.evaluate(model, Stopwatch())


def whole_file(data: str) -> list[Setting]:
    """Has a single file, which is one split, evaluated whole; a run would hold a tenth of it out."""
    whole: list[Setting] = [("dataset.eval_split", "train"), ("evaluation.max_samples", None)]
    return whole if Path(data).expanduser().is_file() else []
