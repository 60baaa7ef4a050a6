"""Differential privacy of whole clients: clipping and normal noise (docs/privacy.md has the statement).

    central        the server releases (sum_i clip(u_i) + N(0, (z C)^2)) / n, n the clients that are expected
    distributed    client i sends clip(u_i) + N(0, (z C)^2 / q), and the server releases the sum over n; a
                   round has at least q = robust.quorum updates, so that the sum has enough
    local          client i releases clip(u_i) + N(0, (z C)^2)

C is `privacy.clip_norm`, z `privacy.noise_multiplier`, and clip(u) is u scaled down to the norm C. n is fixed
before the round, so that a client that comes or goes changes nothing but its own term. What it comes to is in
`accounting`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferret_ext.federated.config import PrivacyConfig
from ferret_ext.federated.seeds import derive

MARGIN = 1 - 2.0**-20  # of clip_norm, for the rounding of norms and products
CHUNK = 2**20  # numbers drawn at once

Normal = Callable[[int], npt.NDArray[np.float64]]  # count -> independent standard normal numbers


def secure_normal(count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers float64 [count] by Box and Muller, from the operating system's generator.

    Their lowest bits have gaps (Mironov, CCS 2012): add them in float64 and release in no more than float32.
    """
    half = (count + 1) // 2
    words = np.frombuffer(os.urandom(16 * half), np.uint64).reshape(2, half)
    uniform = (words >> np.uint64(11)) * 2.0**-53  # [0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def normal_of(seed: int | None, *path: int) -> Normal:
    """Where noise comes from. seed: `privacy.noise_seed`; path: what else repeatable noise depends on."""
    if seed is None:
        return secure_normal
    return np.random.Generator(np.random.PCG64(derive(seed, "noise", *path))).standard_normal


def add_noise(tensor: Tensor, std: float, normal: Normal) -> None:
    """Adds N(0, std^2) to each element of a contiguous tensor, in its dtype."""
    for chunk in torch.split(tensor.view(-1), CHUNK):
        noise = torch.from_numpy(std * normal(chunk.numel()))
        chunk.copy_(chunk.double() + noise.to(chunk.device))


def clip_factor(norm: float, clip_norm: float) -> float:
    """What an update of this norm is multiplied by, so that its norm is at most `clip_norm`."""
    most = clip_norm * MARGIN
    return most / norm if norm > most else 1.0


def multiplier(config: PrivacyConfig) -> float:
    """z, once `accounting.resolve` has found it."""
    assert config.noise_multiplier is not None, "expected a config whose noise is resolved"
    return config.noise_multiplier


@dataclass(frozen=True)
class ClientSide:
    """What a client does to its update before anybody else sees it.

    quorum: updates that a round has at least.
    """

    config: PrivacyConfig
    quorum: int

    def protect(self, update: Sequence[Tensor], round_: int, client: int) -> list[Tensor]:
        """The update, clipped and with noise where clients add it; else as it is. Dtypes stay.

        The norm is that of all tensors together.
        """
        if self.config.noise not in ("distributed", "local"):
            return list(update)
        parts = self.quorum if self.config.noise == "distributed" else 1
        std = multiplier(self.config) * self.config.clip_norm / math.sqrt(parts)
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for tensor in update]
        factor = clip_factor(math.hypot(*norms), self.config.clip_norm)
        normal = normal_of(self.config.noise_seed, round_, client)
        protected = []
        for tensor in update:
            wide = tensor.double().contiguous() * factor
            add_noise(wide, std, normal)
            protected.append(wide.to(tensor.dtype))
        return protected


@dataclass(frozen=True)
class Release:
    """A round's sum as the server releases it, over `expected` clients.

    clip_norm: inf, and std: 0, where clients have done it.
    """

    clip_norm: float
    std: float
    expected: float
    normal: Normal

    @classmethod
    def of(cls, config: PrivacyConfig, expected: float, round_: int) -> Release | None:
        """None where single updates are private already, or nothing is."""
        if not config.of_sums:
            return None
        normal = normal_of(config.noise_seed, round_)
        if config.noise == "distributed":
            return cls(math.inf, 0.0, expected, normal)
        return cls(config.clip_norm, multiplier(config) * config.clip_norm, expected, normal)

    def factors(self, norms: Sequence[float]) -> list[float]:
        """What each update is multiplied by, given its norm."""
        return [clip_factor(norm, self.clip_norm) for norm in norms]

    def add_noise(self, mean: Tensor) -> None:
        """Adds the noise of the sum, over `expected`, to a mean float64."""
        if self.std:
            add_noise(mean, self.std / self.expected, self.normal)
