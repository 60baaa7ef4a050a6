"""Formats: how the columns of a record become a prompt and a response."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ferret_ext.federated.data.errors import DataError

Columns = Mapping[str, Any]  # a record

_TASK = "Below is an instruction that describes a task"
_ASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
_ALPACA = f"{_TASK}. {_ASK}### Response:"


def _alpaca_with(column: str) -> str:
    context = f"### Input:\n{{{column}}}\n\n"
    return f"{_TASK}, paired with an input that provides further context. {_ASK}{context}### Response:"


@dataclass(frozen=True)
class Format:
    """Templates over the columns; `prompt_with` is for records whose `optional` column is not empty."""

    prompt: str
    response: str
    optional: str | None = None
    prompt_with: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every record must have."""
        return tuple(dict.fromkeys((*self.prompt_columns, *_fields(self.response))))

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Those of them that the prompt is made of."""
        return _fields(self.prompt)

    def prompt_of(self, record: Columns) -> str:
        if self.optional and _text(record.get(self.optional)).strip():
            return _fill(self.prompt_with, record)
        return _fill(self.prompt, record)

    def response_of(self, record: Columns) -> str:
        return _fill(self.response, record)


FORMATS = {
    "gsm8k": Format("Question: {question}\nAnswer: ", "{answer}"),
    "alpaca": Format(_ALPACA, "{output}", "input", _alpaca_with("input")),
    "dolly": Format(_ALPACA, "{response}", "context", _alpaca_with("context")),
}


def choose(
    name: str, prompt: str | None, response: str | None, records: Sequence[Columns], source: str
) -> Format:
    """The format called `name`, the one that fits the columns ("auto"), or the user's own templates, in which
    a backslash and an n are an end of line.

    Raises DataError if the records lack a column of it.
    """
    columns = _columns(records)
    if prompt is not None and response is not None:
        chosen = Format(_checked(prompt), _checked(response))
    elif name == "auto":
        fitting = (known for known in FORMATS.values() if columns.issuperset(known.columns))
        if (fit := next(fitting, None)) is None:
            wanted = "; ".join(f"{', '.join(known.columns)} ({key})" for key, known in FORMATS.items())
            raise DataError(
                f"data {source}: expected the columns {wanted}; found {', '.join(sorted(columns))}. "
                "Give dataset.prompt and dataset.response for others"
            )
        chosen = fit
    else:
        chosen = FORMATS[name]
    require_columns(chosen, records, source)
    return chosen


def require_columns(form: Format, records: Sequence[Columns], source: str) -> None:
    """Raises DataError if the records lack a column of the format."""
    columns = _columns(records)
    if missing := [column for column in form.columns if column not in columns]:
        raise DataError(
            f"data {source}: expected the column {', '.join(missing)}, found {', '.join(sorted(columns))}"
        )


def _fields(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name))


def _columns(records: Iterable[Columns]) -> set[str]:
    return {column for record in records for column in record}


def _checked(template: str) -> str:
    """The template, with an end of line where \\n is typed in a shell."""
    template = template.replace(r"\n", "\n")
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"dataset.prompt, dataset.response: {template!r} is no template: {error}") from None
    if bad := [name for name in names if not name.isidentifier()]:
        raise DataError(
            f"dataset.prompt, dataset.response: expected {{column}} in {template!r}, got {{{bad[0]}}}"
        )
    return template


def _fill(template: str, record: Columns) -> str:
    texts = defaultdict(str, {key: _text(value) for key, value in record.items()})
    return Formatter().vformat(template, (), texts)


def _text(value: object) -> str:
    return "" if value is None else str(value)
