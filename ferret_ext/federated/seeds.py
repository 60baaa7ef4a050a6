"""Every random choice of a run follows from its one seed, by purpose, round and client."""

from __future__ import annotations

import zlib

import numpy as np


def derive(seed: int, purpose: str, *path: int) -> int:
    """A 64-bit seed for one purpose, e.g. derive(seed, "client", round, i); the same on every machine."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *path]).generate_state(1, np.uint64)
    return int(words[0])
