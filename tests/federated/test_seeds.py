"""The set of used seeds: a set like Python's, in a tenth of its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferret_ext.federated import seeds
from ferret_ext.federated.seeds import UsedSeeds

SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 9), st.just(2**64 - 1))


@given(batches=st.lists(st.lists(SEEDS, max_size=12), max_size=12), strangers=st.lists(SEEDS))
def test_it_holds_what_was_added(batches: list[list[int]], strangers: list[int]) -> None:
    """However often the waiting ones are sorted in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "UNSORTED", 5)
        used, expected = UsedSeeds(), set[int]()
        for batch in batches:
            used.update(batch)
            expected.update(batch)
            assert used == expected
            assert len(used) == len(expected)
    assert sorted(used) == sorted(expected)
    assert all((seed in used) == (seed in expected) for seed in strangers)


@pytest.mark.parametrize("other", [-1, 2**64, 2**80, "7", None, 7.5])
def test_what_is_no_seed_is_not_in_it(other: object) -> None:
    assert other not in UsedSeeds(range(seeds.UNSORTED + 1))


def test_a_seed_takes_eight_bytes() -> None:
    drawn = np.random.default_rng(0).integers(0, 2**64, 4 * seeds.UNSORTED, np.uint64)
    tracemalloc.start()
    used = UsedSeeds()
    for batch in np.split(drawn, 4):
        used.update(batch.tolist())
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(used) == len(set(drawn.tolist()))
    assert held < 10 * len(used)
