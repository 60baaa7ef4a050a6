"""Fixtures shared by all tests."""

from collections.abc import Iterator

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
