"""From a run's settings to what each client trains on and what is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ferret_ext.federated.config import DatasetConfig, SimulationConfig
from ferret_ext.federated.data import columns, formats, partition
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.formats import Format
from ferret_ext.federated.data.holdings import Holdings, counts_by_key
from ferret_ext.federated.data.partition import Parts
from ferret_ext.federated.data.protocols import PROTOCOLS, Protocol
from ferret_ext.federated.data.records import Count, Record, Tally
from ferret_ext.federated.data.sources import Splits
from ferret_ext.federated.data.tokens import Example, tokenise
from ferret_ext.federated.seeds import derive

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True)
class ClientData:
    """Each client's training examples, the evaluation examples with their records, and who holds what."""

    shards: list[list[Example]]
    held: list[Example]
    held_records: list[Record]
    form: Format
    holdings: Holdings


def load(config: SimulationConfig, tokenizer: Any, max_length: int, say: Callable[[str], None]) -> ClientData:
    """Reads, chooses, tokenises and deals out the records of a run, and says what was kept and dropped.

    max_length: tokens of prompt and response together. Equal settings give equal examples in equal places.
    Raises DataError.
    """
    source = _Source(config, tokenizer, max_length)
    held, evaluation = source.examples_of(EVALUATION)
    examples, training = source.examples_of(TRAINING)
    held = held[: config.evaluation.max_samples]
    counts = {TRAINING: training, EVALUATION: evaluation}
    records = source.records
    parts, holdings = _deal(config, source.protocol, records[TRAINING], counts, len(held))
    for line in (*source.notes, *_lines(holdings)):
        say(line)
    return ClientData(
        shards=[[examples[i] for i in part] for part in parts],
        held=held,
        held_records=[records[EVALUATION][i] for i in evaluation.indices[: len(held)]],
        form=source.form,
        holdings=holdings,
    )


def load_held(
    config: SimulationConfig, tokenizer: Any, max_length: int, say: Callable[[str], None]
) -> list[Example]:
    """The evaluation examples that `load` gives, without the others."""
    source = _Source(config, tokenizer, max_length)
    held, count = source.examples_of(EVALUATION)
    evaluated = held[: config.evaluation.max_samples]
    for line in (*source.notes, _evaluation_line(count, len(evaluated))):
        say(line)
    return evaluated


def load_own(
    config: SimulationConfig, tokenizer: Any, max_length: int, say: Callable[[str], None]
) -> list[Example]:
    """All training examples of a party's own records, none of them held out. Raises DataError."""
    source = _Source(config, tokenizer, max_length, hold_out=False)
    examples, count = source.examples_of(TRAINING)
    for line in (*source.notes, f"data: {TRAINING}: {count}"):
        say(line)
    return examples


class _Source:
    """The chosen records of a run, and how they become examples.

    hold_out: some of the training records are the test split where there is none.
    """

    def __init__(
        self, config: SimulationConfig, tokenizer: Any, max_length: int, *, hold_out: bool = True
    ) -> None:
        self.protocol = PROTOCOLS[config.dataset.protocol]
        splits = self.protocol.read(config.dataset, config.data, derive(config.seed, "records"))
        self.form = _choose_format(config.dataset, self.protocol, splits.train, config.data)
        if hold_out:
            splits = _with_test(splits, config.dataset.eval_split, derive(config.seed, "hold out"))
        self.splits = splits
        self.records = {TRAINING: self.splits.train, EVALUATION: self.splits.test or []}
        self._config, self._tokenizer, self._max_length = config, tokenizer, max_length

    @property
    def notes(self) -> list[str]:
        """What is to be said before what was kept and dropped."""
        wanted, taken = self._config.dataset.max_length, self._max_length
        if taken >= wanted:
            return self.splits.notes
        short = (
            f"data: examples have at most {taken:,} tokens, as many as the model takes; "
            f"dataset.max_length is {wanted:,}"
        )
        return [short, *self.splits.notes]

    def examples_of(self, split: str) -> tuple[list[Example], Count]:
        """A split's examples, and what was dropped on the way."""
        records, source = self.records[split], f"{self._config.data} ({split})"
        formats.require_columns(self.form, records, source)
        limit = self._config.dataset.max_prompt_length
        examples, count = tokenise(records, self.form, self._tokenizer, self._max_length, limit, source)
        count.dropped = self.splits.dropped.get(split, Tally()) + count.dropped
        return examples, count


def _choose_format(dataset: DatasetConfig, protocol: Protocol, records: list[Record], source: str) -> Format:
    name = protocol.format if dataset.format == "auto" else dataset.format
    return formats.choose(name, dataset.prompt, dataset.response, records, source)


def _with_test(splits: Splits, eval_split: str, seed: int) -> Splits:
    """The splits; where there is no test split, a tenth (at least one) of the training records is it."""
    if splits.test is not None:
        return splits
    records = splits.train
    if len(records) < 2:
        raise DataError(
            f"data: expected at least 2 records to train on and to evaluate, found {len(records)}"
        )
    held, *rest = partition.iid(len(records), min(10, len(records)), seed)
    note = f"data: no {eval_split} split, {len(held):,} training records are held out for evaluation"
    return replace(
        splits,
        train=[records[i] for part in rest for i in part],
        test=[records[i] for i in held],
        notes=[*splits.notes, note],
    )


def _deal(
    config: SimulationConfig,
    protocol: Protocol,
    records: list[Record],
    counts: dict[str, Count],
    evaluated: int,
) -> tuple[Parts, Holdings]:
    """The training examples' indices by client; what natural-id leaves out is moved to the dropped ones."""
    chosen, count = config.partition, counts[TRAINING]
    kind = protocol.kind if chosen.kind == "auto" else chosen.kind
    column = chosen.column or protocol.column
    every = columns.values(records, column, config.data) if column else None
    keys = [every[i] for i in count.indices] if every else None
    number = config.num_clients
    if number is None and kind != "natural-id":
        number = protocol.num_clients
    dealt = partition.divide(kind, count.kept, keys, number, chosen, derive(config.seed, "partition"))
    for value, size in Counter(keys[i] for i in dealt.left_out if keys).items():
        count.dropped.add(f"of a {column} with fewer than {chosen.min_size}", value, size)
    left_out = set(dealt.left_out)
    count.indices = [index for i, index in enumerate(count.indices) if i not in left_out]
    holdings = Holdings(
        kind=kind,
        column=column,
        sizes=[len(part) for part in dealt.parts],
        by_key=counts_by_key(dealt, keys),
        names=dealt.names,
        empty=dealt.empty,
        lost=sorted(set(every or []) - set(keys or [])),
        training=count,
        evaluation=counts[EVALUATION],
        evaluated=evaluated,
    )
    return dealt.parts, holdings


def _lines(holdings: Holdings) -> list[str]:
    return [
        _evaluation_line(holdings.evaluation, holdings.evaluated),
        f"data: {TRAINING}: {holdings.training}",
        str(holdings),
    ]


def _evaluation_line(count: Count, evaluated: int) -> str:
    first = f", the first {evaluated:,} are evaluated"
    return f"data: {EVALUATION}: {count}" + (first if evaluated < count.kept else "")
