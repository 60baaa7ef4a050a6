"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import ferret_ext

settings.register_profile("ferret", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ferret")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU is visible to torch")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture
def restored_isa() -> Iterator[None]:
    """Lets a test choose the instruction set."""
    before = ferret_ext.cpu_capability()["isa"]
    yield
    ferret_ext.set_cpu_isa(before)


@pytest.fixture(params=ferret_ext.cpu_capability()["available"])
def isa(request: pytest.FixtureRequest, restored_isa: None) -> str:
    """Every instruction set that this processor can run, in turn."""
    ferret_ext.set_cpu_isa(request.param)
    return str(request.param)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Lets a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and tiny_llm/stories260K-hf/; skips where there is none."""
    named = os.environ.get("FERRET_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    files = ["gsm8k/train.jsonl", "dolly/databricks-dolly-15k.jsonl", "codealpaca/code_alpaca_2k.json"]
    files += ["natural_instructions/splits/sample/train_tasks.txt", "tiny_llm/stories260K-hf/config.json"]
    needed = [folder / name for name in files]
    if absent := [str(path) for path in needed if not path.is_file()]:
        pytest.skip(f"no real data: {absent[0]} is absent; set FERRET_DATA to a folder that has it")
    return folder
