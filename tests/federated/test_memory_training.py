"""Zeroth-order steps take the memory of a forward pass, not a second copy of the model."""

from __future__ import annotations

import pytest
from memory_training import extra_memory

SHAPE = {"layers": 4, "width": 384, "tokens": 64}  # 8.5 million parameters, 34 MB
LARGEST = 4 * 2048 * 384  # bytes of the embeddings


@pytest.fixture(scope="module")
def forward() -> int:
    return extra_memory("forward", **SHAPE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["layerwise", "in_place", "torch"])
def test_a_zeroth_order_step_takes_the_memory_of_a_forward_pass(step: str, forward: int) -> None:
    """And the largest parameter once more, which is perturbed apart or drawn."""
    extra, weights = extra_memory(step, **SHAPE)
    assert extra < forward + 1.2 * LARGEST
    assert extra < weights / 2


@pytest.mark.slow
def test_a_gradient_step_takes_a_copy_and_the_measurement_sees_it(forward: int) -> None:
    extra, weights = extra_memory("gradient", **SHAPE)
    assert extra > forward + 0.9 * weights
