"""Words and elements of the stream contract (docs/streams.md) in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._reference_float import float32, fma32

_LOW32 = 0xFFFFFFFF


class Kind(NamedTuple):
    """A basis kind: an element is an integer b times 2^-exponent / sqrt(d)."""

    tag: int  # word 3 of the counter: contract version 1 and the kind
    elements_per_call: int
    exponent: int
    variance: float  # of b 2^-exponent, that is rho d


KINDS = {
    "rademacher": Kind(0x00010001, 128, 0, 1.0),
    "uniform": Kind(0x00010002, 16, 8, 21845 / 65536),
    "gaussian": Kind(0x00010003, 4, 16, 1.0),
}


def philox(ctr: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four words from four counter words, int64 tensors or ints, which broadcast."""
    x0, x1, x2, x3 = (torch.as_tensor(word, dtype=torch.int64) for word in ctr)
    key0, key1 = key
    for _ in range(10):
        # int64 products wrap around, but their 64 bits are those of the unsigned product
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1 = (product1 >> 32 & _LOW32) ^ x1 ^ key0, product1 & _LOW32
        x2, x3 = (product0 >> 32 & _LOW32) ^ x3 ^ key1, product0 & _LOW32
        key0, key1 = key0 + 0x9E3779B9 & _LOW32, key1 + 0xBB67AE85 & _LOW32
    return [x0, x1, x2, x3]


def words(seed: int, kind: str, t: Tensor | int, k: Tensor | int) -> list[Tensor]:
    """The four words of call t of column k; t and k broadcast."""
    t = torch.as_tensor(t, dtype=torch.int64)
    return philox([t & _LOW32, t >> 32, k, KINDS[kind].tag], (seed & _LOW32, seed >> 32 & _LOW32))


def integers(seed: int, kind: str, start: int, count: int, columns: range) -> Tensor:
    """b(j, k) of `count` > 0 elements from j = `start` on, in the given columns: float64 [columns, count]."""
    per_call = KINDS[kind].elements_per_call
    first = start // per_call
    t = torch.arange(first, (start + count - 1) // per_call + 1)
    k = torch.arange(columns.start, columns.stop)[:, None]
    of_calls = _ELEMENTS[kind](torch.stack(words(seed, kind, t, k), dim=-1))  # [columns, calls, per_call]
    place = start - first * per_call
    return of_calls.flatten(1)[:, place : place + count].double()


def _rademacher(w: Tensor) -> Tensor:
    return 1 - 2 * (w[..., None] >> torch.arange(32) & 1).flatten(-2)


def _uniform(w: Tensor) -> Tensor:
    return 2 * (w[..., None] >> torch.arange(0, 32, 8) & 255).flatten(-2) - 255


def _gaussian(w: Tensor) -> Tensor:
    """Box-Muller: of each pair of words, the first gives the radius and the second the angle."""
    w0, w1 = w[..., 0::2], w[..., 1::2]
    radius, (sin, cos) = _radius(w0), _sin_cos(w1)
    rs = torch.round(float32(radius * sin) * 65536).long()
    rc = torch.round(float32(radius * cos) * 65536).long()
    turn = w1 >> 30
    first = torch.where(turn % 2 == 0, rc, rs) * torch.where((turn == 1) | (turn == 2), -1, 1)
    second = torch.where(turn % 2 == 0, rs, rc) * torch.where(turn >= 2, -1, 1)
    return torch.stack([first, second], dim=-1).flatten(-2)


_ELEMENTS = {"rademacher": _rademacher, "uniform": _uniform, "gaussian": _gaussian}


def _coefficients(text: str) -> list[float]:
    return [float.fromhex(number) for number in text.split()]


_LOG = _coefficients(
    "0x1.555588p-2 -0x1.00026ap-2 0x1.994ba0p-3 -0x1.53d25ap-3 0x1.2c9296p-3 -0x1.212536p-3 0x1.7bca36p-4"
)
_SIN = _coefficients("-0x1.555552p-3 0x1.110c2ap-7 -0x1.9aca02p-13")
_COS = _coefficients("-0x1.fffff4p-2 0x1.554a52p-5 -0x1.661efap-10")
_TWO_LN_2, _QUARTER_PI = _coefficients("0x1.62e430p+0 0x1.921fb6p-1")


def _radius(w0: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = x 2^-31 in (0, 1]: with x = m 2^n and f = m - 1, ln m = f - f^2/2 + f^3 P(f)."""
    x = (w0 >> 1 | 1).float()
    n = (x.view(torch.int32) - 0x3F3504F3) >> 23  # so that m lies in [sqrt(1/2), sqrt(2))
    f = (x.view(torch.int32) - (n << 23)).view(torch.float32).double() - 1
    p = _horner(_LOG, f)
    log_m = fma32(float32(f * f), fma32(f, p, -0.5), f)
    return float32(torch.sqrt(fma32((31 - n).double(), _TWO_LN_2, -2 * log_m)))


def _sin_cos(w1: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angle within +-pi/4 that the low 30 bits mean; the upper two bits are the quarter turn."""
    signed = ((w1 << 2 & _LOW32) ^ 1 << 31) - (1 << 31)
    a = float32(float32(signed.double()) * (_QUARTER_PI * 2**-31))
    q = float32(a * a)
    sin = fma32(float32(_horner(_SIN, q) * q), a, a)
    cos = fma32(_horner(_COS, q), q, 1.0)
    return sin, cos


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = fma32(value, x, coefficient)
    return value
