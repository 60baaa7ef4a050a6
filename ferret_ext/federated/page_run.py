"""The page of one run, from what its folder holds; a run under way is told as far as it is."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ferret_ext.federated import config as configuration
from ferret_ext.federated import journal, ledger, plot, plot_coordinates, plot_partition, plot_runs, wire
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.inspection import value_in_words
from ferret_ext.federated.metrics import RoundMetrics
from ferret_ext.federated.page import Figure, Page, Picture, Table
from ferret_ext.federated.plot_coordinates import NoCoordinates
from ferret_ext.federated.settings import ConfigError, flatten
from ferret_ext.federated.units import in_words
from ferret_ext.federated.wire import Message

WIDTH = 5.6  # inches of a picture: wide enough for a screen's column, and legible on a phone
MOST_CLIENTS = 500  # in the table of who holds what


def read(folder: Path) -> Page:
    """Raises ConfigError."""
    run = plot_runs.read_run(folder, folder.absolute().name)
    about = read_json(folder / "run.json")
    holdings = plot_runs.read_holdings(folder)
    try:
        history = [RoundMetrics.of_row(row) for row in run.rounds]
        messages = list(_messages(folder / journal.LEDGER))
    except (TypeError, KeyError, ValueError, LedgerError) as error:
        raise ConfigError(f"folder: {folder} is damaged: {error}") from None
    done, rounds = history[-1].round, run.config.rounds
    state = "finished" if about else "not finished"
    return Page(
        title=f"Run {run.label}",
        summary=f"{run.config.algorithm} on {run.config.model}, {run.config.data}: "
        f"{done:,} of {rounds:,} rounds, {state}",
        figures=list(_figures(history, about)),
        pictures=list(_pictures(run, history, holdings)),
        tables=[
            *(_rounds(history), *_scores(history), _sent(history, messages), _left_out(history)),
            *([_partition(holdings)] if holdings else []),
            *(*_settings(run.config), environment(about.get("environment", {})), _files(folder)),
        ],
    )


def picture(caption: str, draw: plot.Draw, height: float) -> Picture:
    prefix = caption.split()[0].lower()
    return Picture(caption, Markup(plot.inline_svg(draw, (WIDTH, height), prefix)))


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds, nothing where there is none. Raises ConfigError."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"folder: {path} is damaged: {error}") from None
    return content


def environment(about: dict[str, Any]) -> Table:
    rows = [(name, "none" if value is None else str(value)) for name, value in about.items()]
    note = "" if rows else "Written when a run is finished."
    return Table("Environment", ("what", "which"), rows, words=2, note=note)


def _messages(path: Path) -> Iterator[tuple[str, Message]]:
    """The newest round's broadcast and, where it relays updates, the first of these."""
    if not path.exists():
        return
    newest = deque(ledger.read(path), maxlen=1)
    if not newest or newest[0].round == 0:
        return
    broadcast = wire.decode(newest[0].value("broadcast", bytes))
    if isinstance(updates := broadcast.values.get("updates"), list) and updates:
        yield "client to server", wire.decode(updates[0])
    yield "server to clients", broadcast


# ---- what the page begins with ----


def _figures(history: Sequence[RoundMetrics], about: dict[str, Any]) -> Iterator[Figure]:
    first, last = history[0], history[-1]
    yield Figure("evaluation loss", f"{last.eval_loss:.4f}", f"{first.eval_loss:.4f} before training")
    yield from (Figure(name, f"{mean:.4f}") for name, mean in last.scores.items())
    if last.epsilon is not None:
        yield Figure(
            "privacy, epsilon", f"{last.epsilon:.3f}", f"at delta {last.delta:g}, all rounds together"
        )
    full = sum(len(metrics.clients) * metrics.model_bytes for metrics in history)
    for way in ("up", "down"):
        size = sum(getattr(metrics, f"payload_bytes_{way}") for metrics in history)
        yield Figure(f"bytes {way}, all rounds", in_words(size), _times(full, size))
    seconds = sum(second for row in history for second in _seconds(row))
    yield Figure("time, all parties", f"{seconds:,.1f} s", f"{seconds / max(1, last.round):,.2f} s a round")
    if "peak_memory_bytes" in about:
        yield Figure("peak memory", in_words(float(about["peak_memory_bytes"])))
    missing = sum(len(metrics.left_out) + len(metrics.rejected) for metrics in history)
    drawn = sum(len(metrics.clients) for metrics in history)
    yield Figure("updates left out or rejected", f"{missing:,}", f"of {drawn:,}")


def _pictures(
    run: plot_runs.Run, history: Sequence[RoundMetrics], holdings: Holdings | None
) -> Iterator[Picture]:
    yield picture("Loss by round", plot.single(plot.draw_loss, history), 3.6)
    yield picture("Bytes of a client and round", plot.single(plot.draw_bytes, history), 3.6)
    yield picture("Seconds of a round by phase, its mean", plot.single(plot_runs.draw_phases, run), 3.0)
    with suppress(NoCoordinates):
        found = plot_coordinates.of_run(run.folder, run.config)
        draw = plot.single(plot_coordinates.draw, found, "", 30)
        yield picture("Coordinates by block", draw, plot_coordinates.height(found))
    if holdings:
        draw = plot.single(plot_partition.draw_partition, holdings)
        yield picture("Examples by client", draw, plot_partition.height(holdings))


# ---- its tables ----


def _rounds(history: Sequence[RoundMetrics]) -> Table:
    phases = [phase for phase in plot_runs.PHASES if any(getattr(row, f"seconds_{phase}") for row in history)]
    told = any(row.train_loss is not None for row in history[1:])
    private = any(row.epsilon is not None for row in history)
    head = (
        *("round", "evaluation loss"),
        *(["training loss"] if told else []),
        *(["epsilon so far"] if private else []),
        *(f"{phase} s" for phase in phases),
    )
    rows = [
        (
            *(f"{row.round:,}", f"{row.eval_loss:.4f}"),
            *([_number(row.train_loss, ".4f")] if told else []),
            *([_number(row.epsilon, ".3f")] if private else []),
            *(f"{getattr(row, f'seconds_{phase}'):.3f}" for phase in phases),
            *(f"{row.payload_bytes_up:,}", f"{row.payload_bytes_down:,}", f"{len(row.clients):,}"),
        )
        for row in history
    ]
    note = "Seconds and bytes are sums over a round's clients; clients of one process share a rebuild."
    return Table("Rounds", (*head, "bytes up", "bytes down", "clients"), rows, words=0, note=note)


def _scores(history: Sequence[RoundMetrics]) -> Iterator[Table]:
    if names := list(history[-1].scores):
        rows = [
            (str(row.round), *(_number(row.scores.get(name), ".4f") for name in names))
            for row in history
            if row.scores
        ]
        yield Table("Scores of generated text", ("round", *names), rows, words=0)


def _sent(history: Sequence[RoundMetrics], messages: Sequence[tuple[str, Message]]) -> Table:
    rows = []
    for way, message in messages:
        size = f"{len(wire.encode(message)):,}"
        for name, value in message.values.items() or [("nothing but its head", b"")]:
            rows.append((way, name, value_in_words(value), size))
            way = size = ""  # of the message, not of each value
    turns = sum(len(row.clients) for row in history) or 1
    up, down = (
        sum(getattr(row, f"payload_bytes_{way}") for row in history) / turns for way in ("up", "down")
    )
    note = (
        f"A client sent {up:,.0f} bytes a round and received {down:,.0f} on average; the whole model would "
        f"be {history[-1].model_bytes:,} each way. "
        + ("Below, the newest round's messages as the ledger has them." if rows else "")
    )
    return Table(
        "What was sent", ("from and to", "value", "what it is", "bytes of the message"), rows, 3, note
    )


def _left_out(history: Sequence[RoundMetrics]) -> Table:
    rows = [
        *((row.round, client, "left out: its training failed") for row in history for client in row.left_out),
        *((row.round, it.client, f"rejected: {it.reason}") for row in history for it in row.rejected),
    ]
    told = [(f"{round_:,}", f"{client:,}", reason) for round_, client, reason in sorted(rows)]
    note = "" if told else "Every client that was drawn counted."
    return Table("Left out and rejected", ("round", "client", "why"), told, words=3, note=note)


def _partition(holdings: Holdings) -> Table:
    names = holdings.names or [""] * len(holdings.sizes)
    rows = [
        (str(client), name, ", ".join(f"{key}: {count:,}" for key, count in held.items()), f"{size:,}")
        for client, (name, held, size) in enumerate(zip(names, holdings.by_key, holdings.sizes, strict=True))
    ]
    used = [index for index in range(4) if index in (0, 3) or any(row[index] for row in rows)]
    head = ("client", "name", holdings.column or "", "training examples")
    shown = [tuple(row[index] for index in used) for row in rows[:MOST_CLIENTS]]
    note = f"{str(holdings).capitalize()}. Training: {holdings.training}. Evaluation: {holdings.evaluation}."
    if len(rows) > MOST_CLIENTS:
        note += f" The first {MOST_CLIENTS:,} clients:"
    return Table("Who holds what", [head[index] for index in used], shown, len(used) - 1, note)


def _settings(config: SimulationConfig) -> Iterator[Table]:
    defaults = {leaf.key: leaf.default for leaf in configuration.leaves()}
    values = dict(flatten(asdict(config)))
    rows = [(key, _shown(value), _shown(defaults[key])) for key, value in values.items()]
    chosen = [row for row in rows if row[1] != row[2]]
    head = ("setting", "value", "default")
    yield Table("Configuration", head, chosen, 3, "What is not the default.")
    yield Table("All settings", head, rows, 3, folded=True)


def _files(folder: Path) -> Table:
    rows = []
    for path in sorted(folder.iterdir()):
        parts = [path] if path.is_file() else [it for it in path.rglob("*") if it.is_file()]
        rows.append((path.name, f"{sum(part.stat().st_size for part in parts):,}"))
    return Table("Files", ("file or folder", "bytes"), rows)


def _seconds(row: RoundMetrics) -> Iterator[float]:
    return (getattr(row, f"seconds_{phase}") for phase in plot_runs.PHASES)


def _times(full: float, size: float) -> str:
    return f"{full / size:,.0f} times less than whole models" if 0 < size < full else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
