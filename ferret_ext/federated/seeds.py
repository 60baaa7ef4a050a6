"""Every random choice of a run follows from its one seed, by purpose, round and client."""

from __future__ import annotations

import zlib

import numpy as np


def derive(seed: int, purpose: str, *path: int) -> int:
    """A 64-bit seed for one purpose, e.g. derive(seed, "client", round, i); the same on every machine."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *path]).generate_state(1, np.uint64)
    return int(words[0])


def derive_many(seed: int, purpose: str, count: int) -> list[int]:
    """`count` 64-bit seeds for one purpose."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(count, np.uint64)
    return [int(word) for word in words]
