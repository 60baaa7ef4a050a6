"""Memory beyond inputs and outputs is O(tile) a thread, whatever the number of elements and columns."""

import pytest
from memory_cpu import OPERATORS, extra_memory, extra_memory_here

NUMEL, K = 20_000_000, 16  # 80 MB a tensor
LIMIT = 8 << 20  # bytes a thread; a first call loads 3 MB of code and data


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_takes_little_memory_of_its_own(operator: str, threads: int) -> None:
    assert extra_memory(operator, NUMEL, K, threads) <= LIMIT * threads


def test_extra_memory_sees_an_array_as_large_as_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the tensor is seen, also where its memory has been given back at the end of the call."""
    monkeypatch.setattr("ferret_ext.project", lambda delta, seed, K: delta.clone().sum())
    assert extra_memory_here("project", NUMEL, K, 1) >= 0.9 * 4 * NUMEL  # the system counts in batches
