"""The short examples run, say what they promise, and look as docs/examples.md shows them."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "python_examples").glob("[0-9]*.py"))
FLOWER = "05_flower.py"
PAGE = ROOT / "docs" / "examples.md"
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?")


def output(name: str) -> str:
    """What the example prints whose name begins so."""
    if FLOWER.startswith(name):
        pytest.importorskip("flwr", reason="flwr is not installed (pip install '.[flower]')")
    (path,) = (path for path in EXAMPLES if path.name.startswith(name))
    return run(path)


@cache
def run(path: Path) -> str:
    """Runs the example once: in this process, unless it starts others, which must find a file to import."""
    if "spawn" not in path.read_text() and path.name != FLOWER:
        printed = io.StringIO()
        with redirect_stdout(printed):
            runpy.run_path(str(path), run_name="__main__")
        return printed.getvalue()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers that stand where the pattern has groups, in all of its matches."""
    found = list(re.finditer(pattern, text))
    assert found, f"{pattern!r} is not in {text!r}"
    return [float(number.replace(",", "")) for match in found for number in match.groups()]


def shape(text: str) -> list[str]:
    """The lines with their numbers and digests left out."""
    without = re.sub(r"\b(0x)?[0-9a-f]{8,16}\b", "#", text)
    return [" ".join(NUMBER.sub("#", line).split()) for line in without.splitlines()]


def shown(name: str) -> str:
    """What docs/examples.md shows of the example."""
    block = re.search(
        rf"```\n\$ python python_examples/{re.escape(name)}\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert block, f"{PAGE} does not show {name}"
    return block[1]


MARKED = [pytest.param(p, marks=[pytest.mark.flower] if p.name == FLOWER else []) for p in EXAMPLES]


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.name)
def test_output_looks_as_the_page_shows_it(path: Path) -> None:
    """Line by line, and in bytes, which do not depend on the processor."""
    assert shape(output(path.name)) == shape(shown(path.name))
    counted = r"[\d,]+(?= bytes)"
    assert re.findall(counted, output(path.name)) == re.findall(counted, shown(path.name))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_docstring_says_how_to_run_it(path: Path) -> None:
    assert f"\n    python python_examples/{path.name}\n" in path.read_text()


def test_a_rebuilt_gradient_is_as_noisy_as_expected() -> None:
    cosines = numbers(output("01"), r"cosine (\d\.\d+), expected (\d\.\d+)")
    assert len(cosines) == 8
    for got, expected in zip(cosines[::2], cosines[1::2], strict=True):
        assert got == pytest.approx(expected, abs=0.03)


def test_a_loop_of_ones_own_learns_through_coordinates() -> None:
    losses = numbers(output("02"), r"loss \d\.\d+ whole, (\d\.\d+) by Ferret")
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_compressed_gradients_train_as_well_as_whole_ones() -> None:
    (before,) = numbers(output("03"), r"before training: (\d\.\d+)")
    whole, _, compressed, sent = numbers(output("03"), r"steps: (\d\.\d+), all-reducing ([\d,]+) bytes")
    assert compressed < 0.5 * before
    assert compressed == pytest.approx(whole, abs=0.1)
    assert sent == 4 * 1024


def test_clients_learn_together_what_none_could_alone() -> None:
    """A client knows two of eight classes, so that it alone gets to 25 %."""
    shares = numbers(output("04"), r"(\d+\.\d)% of the test points")
    assert shares[0] < 25
    assert shares[-1] > 85


def test_processes_with_a_part_of_the_model_do_as_one_does() -> None:
    assert output("06").count("the same bits") == 3
    found = re.findall(r"coordinates, (\S+) off .*; loss (\S+)", output("06"))
    assert all(float(off) < 1e-5 for off, _ in found)
    losses = [float(loss) for _, loss in found]
    assert losses == sorted(losses, reverse=True)


def test_a_ledger_gives_the_runs_weights() -> None:
    assert "the run's weights to the bit" in output("07")
    kept, model = numbers(output("07"), r"rebuilt from ([\d,]+) bytes, where the model has ([\d,]+)")
    assert kept < model / 5


def test_slopes_give_the_weights() -> None:
    before, after = numbers(output("08"), r"(?:training|pass): (\d\.\d+)")
    assert after < 0.7 * before
    assert "the same bits" in output("08")


@pytest.mark.flower
def test_a_federation_leaves_the_bits_of_a_run_in_process() -> None:
    assert output("05").count("the same bits as in one process") == 2
