"""Dealing out examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.partition import iid


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_iid_deals_out_every_example_once_and_evenly(examples: int, clients: int, seed: int) -> None:
    clients = min(clients, examples)
    parts = iid(examples, clients, seed)
    assert sorted(i for part in parts for i in part) == list(range(examples))
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1


def test_iid_depends_on_the_seed_alone() -> None:
    assert iid(50, 3, 7) == iid(50, 3, 7)
    assert iid(50, 3, 7) != iid(50, 3, 8)


def test_iid_refuses_more_clients_than_examples() -> None:
    with pytest.raises(DataError, match="num_clients: expected at most the 2 training examples, got 3"):
        iid(2, 3, 0)
