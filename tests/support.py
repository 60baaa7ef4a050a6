"""What several tests need: names of bases and dtypes, test tensors, comparison to the bit."""

import torch
from torch import Tensor

BASES = ("rademacher", "uniform", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILE = 512

# rho d, and the kurtosis of an element: that of n = 256 equally likely levels is 3 - 6/5 (n^2 + 1)/(n^2 - 1)
VARIANCE = {"rademacher": 1.0, "uniform": 21845 / 65536, "gaussian": 1.0}
KURTOSIS = {"rademacher": 1.0, "uniform": 3 - 1.2 * (256**2 + 1) / (256**2 - 1), "gaussian": 3.0}

_PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The elements' bit patterns, so that -0.0 differs from 0.0."""
    return x.detach().cpu().contiguous().view(_PATTERN[x.element_size()])


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    different = (bits(got) != bits(expected)).flatten().nonzero().flatten()
    where = different[:3]
    assert len(different) == 0, (
        f"{len(different)} of {got.numel()} elements differ, the first at {where.tolist()}: "
        f"got {got.flatten()[where].tolist()}, expected {expected.flatten()[where].tolist()}"
    )


def normal(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every call."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
