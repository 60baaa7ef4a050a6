"""Every random choice of a run follows from its one seed, by purpose, round and client."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Set

import numpy as np

UNSORTED = 1 << 14  # seeds that wait to be sorted in among the others


def derive(seed: int, purpose: str, *path: int) -> int:
    """A 64-bit seed for one purpose, e.g. derive(seed, "client", round, i); the same on every machine."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *path]).generate_state(1, np.uint64)
    return int(words[0])


def derive_many(seed: int, purpose: str, count: int) -> list[int]:
    """`count` 64-bit seeds for one purpose."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(count, np.uint64)
    return [int(word) for word in words]


class UsedSeeds(Set[int]):
    """A set of 64-bit seeds that only grows: 8 bytes each, where one of Python's ints takes about 100.

    Most stand in a sorted array; the newest wait in a set until there are enough for one more copy of it.
    """

    def __init__(self, seeds: Iterable[int] = ()) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._waiting: set[int] = set()
        self.update(seeds)

    def update(self, seeds: Iterable[int]) -> None:
        """Adds seeds, each in [0, 2^64)."""
        self._waiting.update(seed for seed in seeds if seed not in self)
        if len(self._waiting) >= UNSORTED:
            new = np.array(sorted(self._waiting), np.uint64)
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, new), new)
            self._waiting.clear()

    def __contains__(self, seed: object) -> bool:
        if seed in self._waiting:
            return True
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            return False
        value = np.uint64(seed)
        place = np.searchsorted(self._sorted, value)
        return bool(place < len(self._sorted) and self._sorted[place] == value)

    def __iter__(self) -> Iterator[int]:
        yield from self._sorted.tolist()
        yield from self._waiting

    def __len__(self) -> int:
        return len(self._sorted) + len(self._waiting)
