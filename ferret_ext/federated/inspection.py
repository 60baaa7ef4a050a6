"""`ferret inspect`: what a run folder, a ledger, a message or a plan holds, in lines of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferret_ext import BlockPlan
from ferret_ext.federated import journal, ledger, wire
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.settings import ConfigError, read_yaml
from ferret_ext.federated.units import in_words
from ferret_ext.federated.wire import Message, WireError

SHOWN = 20  # rows of a table; of longer ones the first and the last
LENGTH_BYTES = 8  # before each record of a ledger
TOLD = ("algorithm", "model", "data", "rounds", "seed", "dtype", "ferret.K", "ferret.mode")  # of a config


def describe(path: Path) -> Iterator[str]:
    """Lines on what the path holds. Raises ConfigError, LedgerError."""
    try:
        lines = _reader_of(path)
        yield from lines(path)
    except OSError as error:
        raise ConfigError(f"path: {path} cannot be read: {error.strerror}") from None
    except (WireError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"path: {path} is damaged or of another version: {error}") from None


def _reader_of(path: Path) -> Callable[[Path], Iterator[str]]:
    """Goes by the content, whatever the name."""
    if path.is_dir():
        if (path / "config.yaml").exists() or (path / journal.HEAD).exists():
            return describe_run
        raise ConfigError(
            f"path: expected a run's folder, got {str(path)!r}, which has no config.yaml and no ledger"
        )
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES + len(wire.MAGIC))
    if start.startswith(wire.MAGIC):
        return describe_message
    if start[LENGTH_BYTES:] == wire.MAGIC:
        return describe_ledger
    if start.lstrip()[:1] == b"{":
        return describe_plan
    raise ConfigError(f"path: expected a run's folder, a ledger, a message or a plan, got {str(path)!r}")


def describe_run(folder: Path) -> Iterator[str]:
    """How far it got, its settings, files and rounds."""
    config = dict(read_yaml(folder / "config.yaml")) if (folder / "config.yaml").exists() else {}
    rows = _rounds(folder)
    done, planned = (rows[-1]["round"] if rows else 0), config.get("rounds", "?")
    finished = (folder / "run.json").exists()
    state = "finished" if finished else "not finished"
    yield f"run {folder}: {done} of {planned} rounds, {state}"
    yield "  " + ", ".join(f"{key}={config[key]}" for key in TOLD if key in config)
    sizes = {
        it.name: sum(f.stat().st_size for f in ([it] if it.is_file() else it.rglob("*")) if f.is_file())
        for it in sorted(folder.iterdir())
    }
    yield f"  {in_words(sum(sizes.values()))}: " + ", ".join(f"{n} {in_words(s)}" for n, s in sizes.items())
    if rows:
        up, down = (sum(row[f"payload_bytes_{way}"] for row in rows) for way in ("up", "down"))
        first, last = rows[0]["eval_loss"], rows[-1]["eval_loss"]
        yield (
            f"  evaluation loss {first:.4f} before training, {last:.4f} after round {done}; "
            f"{up:,} bytes up, {down:,} down"
        )
    if (folder / journal.LEDGER).exists() or (folder / journal.HEAD).exists():
        yield from describe_ledger(folder / journal.LEDGER)
    if not finished:
        yield f"ferret resume {folder} goes on"


def describe_ledger(path: Path) -> Iterator[str]:
    """Its records, each checked for its place, and what its rounds rejected."""
    table, notes, size, opening = [], [], 0, None
    for record in ledger.read(path):
        opening = opening or record
        length = len(wire.encode(record))
        size += LENGTH_BYTES + length
        table.append(_row(record, length))
        notes += _rejections(record)
    if opening is None:
        raise LedgerError(f"ledger: expected records in {path}, got none")
    head = ledger.read_head(path)
    yield (
        f"ledger {path}: {len(table):,} records, {size:,} bytes, {opening.algorithm}, run {opening.run.hex()}"
    )
    yield f"  base model SHA-256 {opening.value('base', bytes).hex()}"
    if head is None:
        yield "  no ledger.head beside it, so that records cut off at the end would not be noticed"
    else:
        yield f"  newest record SHA-256 {head.sha256}, as ledger.head says"
    names = ("round", "bytes", "clients", "accepted", "left out", "rejected", "weights after it")
    yield from _table([names, *_shortened(table)])
    yield from notes


def describe_message(path: Path) -> Iterator[str]:
    """Its head, and each of its values."""
    data = path.read_bytes()
    message = wire.decode(data)
    of_client = message.kind in wire.OF_CLIENTS
    sender = f"client {message.client}, weight {message.weight:g}" if of_client else "server"
    yield (
        f"message {path}: {message.kind} of {message.algorithm}, round {message.round}, {sender}, "
        f"{len(data):,} bytes, wire format {wire.VERSION}"
    )
    yield f"  run {message.run.hex()}, model or plan {message.digest.hex()}, weights {message.weights.hex()}"
    yield from (f"  {name}: {value_in_words(value)}" for name, value in message.values.items())


def describe_plan(path: Path) -> Iterator[str]:
    """Its blocks, the largest first."""
    plan = BlockPlan.from_dict(json.loads(path.read_text("utf-8")))
    numel = sum(block.numel for block in plan.blocks)
    yield (
        f"plan {path}: {len(plan.tensors):,} tensors of {numel:,} elements in {len(plan.blocks):,} blocks on "
        f"{plan.K:,} coordinates"
    )
    yield f"  SHA-256 {plan.digest()}"
    blocks = sorted(plan.blocks, key=lambda block: -block.numel)
    rows = [(b.name, f"{b.numel:,}", f"{b.k:,}", f"{b.numel / b.k:,.0f}") for b in blocks]
    yield from _table([("block", "elements", "K_l", "elements a coordinate"), *_shortened(rows)])


def _rounds(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _row(record: Message, length: int) -> tuple[str, ...]:
    if record.round == 0:
        return ("0", f"{length:,}", "", "", "", "", record.weights.hex())
    outcome = journal.outcome_of(record)
    people = (outcome.clients, outcome.accepted, outcome.left_out, outcome.rejected)
    return (str(record.round), f"{length:,}", *(str(len(it)) for it in people), record.weights.hex())


def _rejections(record: Message) -> list[str]:
    if record.round == 0:
        return []
    rejected = journal.outcome_of(record).rejected
    return [f"  round {record.round}: client {it.client} was rejected: {it.reason}" for it in rejected]


def value_in_words(value: wire.Value) -> str:
    """A value of a message: its kind, size and range."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list):
        return f"{len(value):,} times bytes, {sum(map(len, value)):,} in all"
    if not isinstance(value, np.ndarray):
        text = f"{value!r}"  # whatever is in it, on one line
        return text if len(text) <= 80 else f"{text[:77]}.."
    text = f"{'bfloat16' if value.dtype == wire.BFLOAT16 else value.dtype} {list(value.shape)}"
    if value.dtype.names or value.size == 0:
        return text
    norm = f", norm {np.linalg.norm(value.astype(float)):.4g}" if value.dtype.kind == "f" else ""
    return f"{text}, {value.min():.4g} to {value.max():.4g}{norm}"


def _shortened(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(rows) <= SHOWN:
        return list(rows)
    return [*rows[: SHOWN // 2], ("..",) * len(rows[0]), *rows[-SHOWN // 2 :]]


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as they need be: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [not column[-1][:1].isdigit() for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if words else cell.rjust(width)
            for cell, width, words in zip(row, widths, left, strict=True)
        )
        yield f"  {'  '.join(cells).rstrip()}"
