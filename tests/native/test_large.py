"""Lengths beyond 2^32 elements. Needs 20 GB of memory, so it runs on demand."""

import pytest
import torch
from support import assert_same_bits

import ferret_ext

pytestmark = pytest.mark.slow

NUMEL = 2**32 + 1000
K = 3


def test_project_and_reconstruct_reach_elements_beyond_2_to_the_32() -> None:
    """An update that is zero but at its two ends has the sum of the coordinates of the ends, as shards."""
    delta = torch.zeros(NUMEL, dtype=torch.bfloat16)
    delta[:1000] = torch.randn(1000)
    delta[-2000:] = torch.randn(2000)
    gamma = ferret_ext.project(delta, 5, K)
    ends = ferret_ext.project(delta[:1000], 5, K, numel=NUMEL)
    ends += ferret_ext.project(delta[-2000:], 5, K, offset=NUMEL - 2000, numel=NUMEL)
    torch.testing.assert_close(gamma, ends, rtol=1e-6, atol=0)

    ferret_ext.reconstruct_(delta.zero_(), gamma, 5)
    tail = ferret_ext.reconstruct(gamma, 5, 2000, offset=NUMEL - 2000, numel=NUMEL, dtype=torch.bfloat16)
    assert_same_bits(delta[-2000:], tail)
