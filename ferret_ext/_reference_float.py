"""Correctly rounded float32 and float64 arithmetic in plain torch, where every value is a float64 tensor.

torch has no fused multiply-add, and float64 arithmetic rounded to float32 afterwards rounds twice. Two facts
help: a sum or product can be split into its rounded value and its exact error, and a sum *rounded to odd* may
be rounded again without harm (Boldo and Melquiond, Emulation of FMA and correctly rounded sums: proved
algorithms using rounding to odd, IEEE Transactions on Computers, 2008).
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32(x: Tensor) -> Tensor:
    """x rounded to float32.

    A product, square root or sum of float32 values may be rounded to float64 first, as 53 >= 2 * 24 + 2 bits.
    """
    return x.float().double()


def fma32(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c of float32 values, rounded once to float32; the product is exact in float64."""
    return float32(_sum_to_odd(a * b, torch.as_tensor(c, dtype=torch.float64)))


def fma64(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of float64 values, rounded once; for |a b| > 2^-960, so that its error is a float64 too."""
    high, low = _two_product(a, b)
    middle, lowest = _two_sum(c, low)
    total, rest = _two_sum(high, middle)
    result = total + _sum_to_odd(lowest, rest)
    # the sign of a zero and an overflow come out right without the errors' help only
    return torch.where((result != 0) & result.isfinite(), result, a * b + c)


def exponent(x: Tensor) -> Tensor:
    """n with |x| = m 2^n, 0.5 <= m < 1; 0 for x = 0."""
    return torch.frexp(x).exponent


def two_to(n: Tensor) -> Tensor:
    """2^n for integers |n| <= 1022."""
    return (n.long() + 1023 << 52).view(torch.float64)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as the rounded sum and its exact error."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a b as the rounded product and its exact error, from halves of 26 bits."""
    (high_a, low_a), (high_b, low_b) = _halves(a), _halves(b)
    product = a * b
    return product, ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = ((x.view(torch.int64) + (1 << 26)) & -(1 << 27)).view(torch.float64)
    return high, x - high


def _sum_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b, or if that is inexact, the one of its two neighbours whose last bit is 1."""
    total, error = _two_sum(a, b)
    bits = total.view(torch.int64)
    towards_sum = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & (bits % 2 == 0), bits + towards_sum, bits).view(torch.float64)
