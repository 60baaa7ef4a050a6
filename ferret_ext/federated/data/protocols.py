"""The paper's data protocols (arXiv 2409.06277, section 5): what is trained on, and what is evaluated.

Each is a function from the dataset's settings, the source and a seed to `Splits`, with counts of what was
left out and why. Where `test` is None, a tenth of the records is held out later, as in protocol "none".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ferret_ext.federated.config import DatasetConfig
from ferret_ext.federated.data import columns, sources
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.natural_instructions import natural_instructions
from ferret_ext.federated.data.records import Record, Tally
from ferret_ext.federated.data.sources import Splits

EXCLUDED_LANGUAGE = "X86-64 Assembly"
MOST_LANGUAGES = 100  # a column with more values names no languages


@dataclass(frozen=True)
class Protocol:
    """How records are chosen, and what format, column, partition and number of clients go with them."""

    read: Callable[[DatasetConfig, str, int], Splits]
    format: str = "auto"
    column: str | None = None
    kind: str = "iid"
    num_clients: int = 3


def plain(dataset: DatasetConfig, source: str, seed: int = 0) -> Splits:
    """All records, with the columns that dataset.columns and dataset.labels_file add."""
    splits = sources.read(source, dataset.train_split, dataset.eval_split, dataset.config_name)
    train, test = splits.train, splits.test
    if dataset.labels_file is not None:
        train = columns.join_labels(train, Path(dataset.labels_file).expanduser(), source)
    if dataset.columns is not None:
        mapping = columns.read_mapping(dataset.columns)
        train = columns.copy_columns(train, mapping, source)
        test = test and columns.copy_columns(test, mapping, f"{source} ({dataset.eval_split})")
    return Splits(train, test)


def gsm8k(dataset: DatasetConfig, source: str, seed: int = 0) -> Splits:
    """The official train and test splits, with question and answer as instruction and output too."""
    splits = plain(dataset, source)
    if splits.test is None:
        raise DataError(
            f"data {source}: expected the official splits train and test, found no {dataset.eval_split}"
        )
    names = {"instruction": "question", "output": "answer"}
    return Splits(
        columns.copy_columns(splits.train, names, source), columns.copy_columns(splits.test, names, source)
    )


def dolly(dataset: DatasetConfig, source: str, seed: int = 0) -> Splits:
    """The last category in alphabetical order is evaluated, zero-shot; all others are trained on."""
    splits = plain(dataset, source)
    categories = columns.values(splits.train, "category", source)
    last = max(categories)
    if last == min(categories):
        raise DataError(f"data {source}: expected at least two values of category, found only {last}")
    pairs = list(zip(splits.train, categories, strict=True))
    test = [record for record, category in pairs if category == last]
    notes = [f"data: the category {last}, {len(test):,} records, is held out for evaluation"]
    if splits.test is not None:
        notes.append(f"data: the split {dataset.eval_split}, {len(splits.test):,} records, is not used")
    return Splits([record for record, category in pairs if category != last], test, notes=notes)


def codealpaca(dataset: DatasetConfig, source: str, seed: int = 0) -> Splits:
    """Records by language, without X86-64 Assembly.

    The language is in the column `language`, or, as in the paper's file, in `input`.
    """
    splits = plain(dataset, source)
    named = any("language" in record for record in splits.train)
    if not named:
        _check_languages(splits.train, source)
    train, dropped = _of_languages(splits.train, named)
    if splits.test is None:
        return Splits(train, None, {"training": dropped})
    test, dropped_too = _of_languages(splits.test, named)
    return Splits(train, test, {"training": dropped, "evaluation": dropped_too})


def _of_languages(records: list[Record], named: bool) -> tuple[list[Record], Tally]:
    """The records with their language as a column, and what was dropped."""
    tally, kept = Tally(), []
    for record in records:
        language = str(record.get("language" if named else "input") or "").strip()
        if language.lower() in ("", "unknown"):
            tally.add("without a language", record.place)
        elif language.lower() == EXCLUDED_LANGUAGE.lower():
            tally.add(f"in {EXCLUDED_LANGUAGE}")
        else:
            kept.append(record.having({"language": language}))
    return kept, tally


def _check_languages(records: list[Record], source: str) -> None:
    """Raises DataError unless `input` looks like a language's name in every record."""
    inputs = [str(record.get("input") or "").strip() for record in records]
    if not all(inputs) or len(set(inputs)) > MOST_LANGUAGES:
        raise DataError(
            f"data {source}: expected a column language, or a language in every input, found "
            f"{len(set(inputs)):,} different inputs, {inputs.count('')} of {len(inputs)} empty; name them by "
            "dataset.labels_file or dataset.columns=language=COLUMN"
        )


PROTOCOLS = {
    "none": Protocol(plain),
    "natural-instructions": Protocol(natural_instructions, "alpaca", "task", "natural-id"),
    "dolly": Protocol(dolly, "dolly", "category", "dirichlet", 200),
    "codealpaca": Protocol(codealpaca, "alpaca", "language", "natural-id"),
    "gsm8k": Protocol(gsm8k, "alpaca"),
}
