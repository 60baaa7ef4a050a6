"""What a run shows: bars on a terminal, plain lines elsewhere, and a table at its end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ferret_ext.federated import progress
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.evaluation import Evaluation, Sample, describe
from ferret_ext.federated.metrics import Rejection, RoundMetrics
from ferret_ext.federated.report import RunFolder


class Lines:
    """Shows lines of text as they are."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class Count(ProgressColumn):
    """How many of how many, where it is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}", justify="right")


class Narration(Lines):
    """Shows a run as it goes by, and keeps its metrics in the run's folder. A context manager.

    On a terminal three bars stand below the lines: rounds, a round's clients, and what is done right now.
    """

    def __init__(self, console: Console, folder: RunFolder, rounds: int) -> None:
        super().__init__(console)
        self._folder = folder
        self._rounds = rounds
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            Count(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left {task.fields[note]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=3600.0,  # a round may take minutes
        )
        self._round = self._progress.add_task("rounds", total=rounds, visible=False, note="")
        self._clients = self._progress.add_task("clients", total=None, visible=False, note="")
        self._phase = self._progress.add_task("loading", total=None, note="")
        self._heard: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Narration:
        self._progress.start()
        if not self._progress.disable:
            self._heard = progress.heard_by(self._doing)
        self._heard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heard.__exit__(kind, error, trace)
        self._progress.stop()
        if kind is not None:
            self._folder.stop()

    def _doing(self, what: str, done: int, total: int) -> None:
        if done == 0:
            self._progress.reset(self._phase, description=what, total=total or None, visible=True)
        else:
            self._progress.update(self._phase, completed=done, total=total)

    def dealt(self, holdings: Holdings) -> None:
        self._folder.holdings = holdings

    def round_begins(self, round_: int, clients: list[int]) -> None:
        self._progress.update(self._round, completed=round_ - 1, visible=True)
        self._progress.reset(self._clients, total=len(clients), visible=True, note=f"of round {round_}")

    def client_done(self, round_: int, client: int) -> None:
        self._progress.advance(self._clients)

    def client_left_out(self, round_: int, client: int, reason: str) -> None:
        self.say(f"round {round_}: client {client} is left out: {reason}")

    def update_rejected(self, round_: int, rejection: Rejection) -> None:
        self.say(f"round {round_}: what client {rejection.client} sent is rejected: {rejection.reason}")

    def round_ends(self, metrics: RoundMetrics, samples: Sequence[Sample]) -> None:
        notes = self._folder.append(metrics, samples)
        self.say(_line(metrics, self._rounds))
        for note in notes:
            self.say(note)
        if samples:
            self.say(f"round {metrics.round}/{self._rounds}: {describe(metrics.scores, samples)}")
        self._progress.update(self._round, completed=metrics.round)


def show_table(console: Console, history: Sequence[RoundMetrics]) -> None:
    """The run by round: loss, seconds, bytes, and below them the bytes of whole models and the scores."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("round", "eval loss", "local s", "project s", "rebuild s", "bytes up", "bytes down"):
        table.add_column(head, justify="right", overflow="fold")
    for metrics in history:
        table.add_row(*_row(metrics))
    whole = f"{len(history[-1].clients) * history[-1].model_bytes:,}"
    table.add_section()
    table.add_row("full model", "", "", "", "", whole, whole)
    console.print(table)
    if history[-1].scores:
        console.print(_score_table(history))
    console.print(_totals(history), highlight=False, soft_wrap=True)


def show_comparison(console: Console, cells: Sequence[Sequence[str]]) -> None:
    """The table of a comparison."""
    head, *rows = cells
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """One model's loss and scores."""
    lines = Lines(console)
    lines.say(f"evaluation loss {evaluation.loss:.4f} over {evaluation.records} records")
    if evaluation.samples:
        lines.say(describe(evaluation.scores, evaluation.samples))


def _totals(history: Sequence[RoundMetrics]) -> str:
    up, down = (
        sum(getattr(metrics, f"payload_bytes_{way}") for metrics in history) for way in ("up", "down")
    )
    full = sum(len(metrics.clients) * metrics.model_bytes for metrics in history)
    return (
        "Seconds and bytes are sums over a round's clients; clients of one process share a rebuild.\n"
        f"All rounds: {up:,} bytes up and {down:,} down. Full models would be {full:,} each way, "
        f"{full / up:,.0f} and {full / down:,.0f} times as many."
    )


def _line(metrics: RoundMetrics, rounds: int) -> str:
    if metrics.round == 0:
        return f"round 0/{rounds}: evaluation loss {metrics.eval_loss:.4f} before training"
    return (
        f"round {metrics.round}/{rounds}: evaluation loss {metrics.eval_loss:.4f}, "
        f"{_training(metrics)}local {metrics.seconds_local:.2f} s, "
        f"project {metrics.seconds_project:.3f} s, rebuild {metrics.seconds_rebuild:.3f} s, "
        f"{metrics.payload_bytes_up:,} bytes up, {metrics.payload_bytes_down:,} down{_spent(metrics)}"
    )


def _training(metrics: RoundMetrics) -> str:
    return "" if metrics.train_loss is None else f"training loss {metrics.train_loss:.4f}, "


def _spent(metrics: RoundMetrics) -> str:
    return "" if metrics.epsilon is None else f", epsilon {metrics.epsilon:.3f} at delta {metrics.delta:g}"


def _score_table(history: Sequence[RoundMetrics]) -> Table:
    """A line for each round whose text was scored."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("round", *history[-1].scores):
        table.add_column(head, justify="right", overflow="fold")
    for metrics in history:
        if metrics.scores:
            table.add_row(str(metrics.round), *(f"{mean:.4f}" for mean in metrics.scores.values()))
    return table


def _row(metrics: RoundMetrics) -> tuple[str, ...]:
    if metrics.round == 0:
        return ("0", f"{metrics.eval_loss:.4f}", "", "", "", "", "")
    return (
        str(metrics.round),
        f"{metrics.eval_loss:.4f}",
        f"{metrics.seconds_local:.2f}",
        f"{metrics.seconds_project:.3f}",
        f"{metrics.seconds_rebuild:.3f}",
        f"{metrics.payload_bytes_up:,}",
        f"{metrics.payload_bytes_down:,}",
    )
