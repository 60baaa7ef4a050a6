"""What a run says it is doing, and the bars that a terminal shows of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as some
from rich.console import Console

from ferret_ext.federated import progress
from ferret_ext.federated.cli import main
from ferret_ext.federated.client import count_steps, steps
from ferret_ext.federated.config import TrainingConfig, build
from ferret_ext.federated.console import Narration
from ferret_ext.federated.report import RunFolder


def heard(*arguments: str) -> list[tuple[str, int, int]]:
    said: list[tuple[str, int, int]] = []
    with progress.heard_by(lambda *what: said.append(what)):
        assert main(["simulate", *SMALL, *arguments]) == 0
    return said


def test_a_round_says_what_it_does(tmp_path: Path) -> None:
    """Two clients with two steps each; four records evaluated in batches of two."""
    said = heard("rounds=1", "evaluation.per_device_eval_batch_size=2", "--out", str(tmp_path))
    client = [("rebuild", 0, 0), ("local", 0, 0), ("local", 1, 2), ("local", 2, 2), ("project", 0, 0)]
    evaluation = [("eval", 0, 0), ("eval", 1, 2), ("eval", 2, 2)]
    assert said == [*evaluation, *client, *client, ("server", 0, 0), *evaluation]


def test_steps_by_losses_are_told_too(tmp_path: Path) -> None:
    said = heard("rounds=1", "algorithm=fedkseed", "zeroth_order.steps=3", "--out", str(tmp_path))
    assert [it for it in said if it[0] == "local"][:4] == [("local", n, n and 3) for n in range(4)]


def test_nobody_listens_afterwards() -> None:
    said: list[str] = []
    with progress.heard_by(lambda what, *_: said.append(what)):
        progress.report("inside")
    progress.report("outside")
    assert said == ["inside"]


@given(some.integers(1, 40), some.integers(1, 5), some.integers(1, 5), some.floats(0.1, 3) | some.none())
def test_steps_are_counted_before_they_are_made(
    examples: int, batch: int, group: int, epochs: float | None
) -> None:
    config = TrainingConfig(
        max_steps=3,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=group,
    )
    assert count_steps(examples, config) == len(list(steps(examples, config, 0)))


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_stand_on_a_terminal_only(tmp_path: Path, terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, color_system=None)
    config = build([("model", "m"), ("data", "d"), ("out", str(tmp_path / "run"))])
    with Narration(console, RunFolder(config), 7) as narration:
        narration.round_begins(3, [0, 4])
        narration.client_done(3, 0)
        progress.report("local")
        progress.report("local", 5, 9)
        narration._progress.refresh()
        narration.say("a line")
    shown = text.getvalue()
    assert "a line" in shown
    for word in ("rounds", "2/7", "clients", "1/2", "of round 3", "local", "5/9"):
        assert (word in shown) == terminal, word
