"""Who holds which training example. The kinds are named as Flower names its partitioners; `divide` chooses.

Each is a function of its arguments and a seed (numpy's PCG64). All but natural_id give every example to
exactly one client; natural_id leaves out the values with fewer than `min_size` examples, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferret_ext.federated.config import PartitionConfig
from ferret_ext.federated.data.errors import DataError

Parts = list[list[int]]  # client -> its examples' indices
Counts = NDArray[np.int64]

BY_SIZE = ("linear", "square", "exponential")
DIRICHLET_MIN_SIZE = 10  # as in the paper and in Flower; 1 for the other kinds
DRAWS = 1000  # of Dirichlet shares before giving up


@dataclass(frozen=True)
class Partition:
    """The examples' indices by client. A client has a name where its examples share one value of a column."""

    parts: Parts
    names: list[str] | None = None
    left_out: list[int] = field(default_factory=list)
    empty: int = 0  # clients that got nothing and are not in `parts`


def divide(
    kind: str,
    count: int,
    keys: Sequence[str] | None,
    num_clients: int | None,
    config: PartitionConfig,
    seed: int,
) -> Partition:
    """`count` examples among `num_clients` clients, by `keys`, each example's value of a column.

    kind: one of `PartitionConfig.kind`. keys: [count], needed by dirichlet, natural-id and pathological.
    num_clients: None for as many as natural-id finds. With min_size 0 clients may go empty; these take no
    part, and the rest are numbered anew. Raises DataError.
    """
    least = config.min_size
    if least is None:
        least = DIRICHLET_MIN_SIZE if kind == "dirichlet" else 1
    if kind == "natural-id":
        return natural_id(_known(kind, keys), num_clients, least)
    if num_clients is None:
        raise DataError(f"num_clients: expected a number for partition {kind}, got none")
    _check_enough(count, num_clients, least)
    if kind == "iid":
        parts = iid(count, num_clients, seed)
    elif kind in BY_SIZE:
        parts = sized(kind, count, num_clients, seed, least)
    elif kind == "dirichlet":
        parts = dirichlet(
            _known(kind, keys), num_clients, seed, config.alpha, least, balanced=config.self_balancing
        )
    else:
        parts = pathological(_known(kind, keys), num_clients, seed, config.classes_per_client)
    smallest = min(range(num_clients), key=lambda client: len(parts[client]))
    if len(parts[smallest]) < least:
        raise DataError(
            f"partition.min_size: expected at least {least} examples for each client, client {smallest} of "
            f"{num_clients} has {len(parts[smallest])}"
        )
    held = [part for part in parts if part]
    return Partition(held, empty=num_clients - len(held))


def iid(num_examples: int, num_clients: int, seed: int) -> Parts:
    """The examples' indices, shuffled and dealt out to the clients as evenly as can be.

    Raises DataError if there are fewer examples than clients.
    """
    _check_enough(num_examples, num_clients, 1)
    order = _random(seed).permutation(num_examples)
    return [part.tolist() for part in np.array_split(order, num_clients)]


def sized(kind: str, num_examples: int, num_clients: int, seed: int, min_size: int = 1) -> Parts:
    """Shuffled examples in parts whose sizes grow with i = 1 .. num_clients: as i, i^2 or e^i.

    A client whose share would be below `min_size` gets that many, and the shares of the later ones shrink
    accordingly; sizes are rounded down, the last client takes the rest.
    """
    _check_enough(num_examples, num_clients, min_size)
    grow: dict[str, Any] = {
        "linear": lambda i: i,
        "square": lambda i: i * i,
        "exponential": lambda i: math.exp(i - num_clients),
    }
    weights = [float(grow[kind](i)) for i in range(1, num_clients + 1)]
    rests = np.cumsum(weights[::-1])[::-1].tolist()  # a weight and all later ones
    sizes, left = [], num_examples
    for weight, rest in zip(weights[:-1], rests[:-1], strict=True):
        sizes.append(max(min_size, int(left * weight / rest)))
        left -= sizes[-1]
    order = _random(seed).permutation(num_examples)
    return [part.tolist() for part in np.split(order, np.cumsum(sizes, dtype=np.int64))]


def dirichlet(
    keys: Sequence[str],
    num_clients: int,
    seed: int,
    alpha: float,
    min_size: int = DIRICHLET_MIN_SIZE,
    *,
    balanced: bool = True,
) -> Parts:
    """Label skew (arXiv 1905.12022): each value's examples go to the clients in shares drawn from Dir(alpha).

    The smaller alpha, the fewer clients share a value. balanced: a client that has the mean number of
    examples gets none of the values after that, as in the published code of FedKSeed. Shares are drawn again,
    up to 1000 times, until every client has `min_size` examples; raises DataError if that does not help.
    """
    _check_enough(len(keys), num_clients, min_size)
    random, groups = _random(seed), _group(keys)
    sizes = [len(group) for group in groups.values()]
    for _ in range(DRAWS):
        counts = _draw_counts(random, sizes, num_clients, alpha, balanced)
        if counts.sum(0).min() >= min_size:
            return _deal(groups, counts, random)
    raise DataError(
        f"partition.min_size: none of {DRAWS} draws gave {min_size} of the {len(keys)} examples to each of "
        f"{num_clients} clients at partition.alpha {alpha:g}; raise alpha, or lower min_size or num_clients"
    )


def pathological(keys: Sequence[str], num_clients: int, seed: int, classes_per_client: int) -> Parts:
    """Each client gets examples of `classes_per_client` values only, of fewer where a value has too few.

    A client takes the values that the fewest clients have so far, ties broken at random, so that every value
    is held by someone and by about equally many; a value's examples are shared out evenly among its holders.
    Raises DataError if the clients cannot hold all values, or there are fewer than a client should get.
    """
    random, groups = _random(seed), _group(keys)
    fewest = -(-len(groups) // num_clients)
    if not fewest <= classes_per_client <= len(groups):
        raise DataError(
            f"partition.classes_per_client: expected {fewest} to {len(groups)} for {len(groups)} values and "
            f"{num_clients} clients, got {classes_per_client}"
        )
    holds = np.zeros((len(groups), num_clients), dtype=np.int64)
    for client in range(num_clients):
        order = random.permutation(len(groups))
        rarest = order[np.argsort(holds.sum(1)[order], kind="stable")][:classes_per_client]
        holds[rarest, client] = 1
    counts = np.zeros_like(holds)
    for row, held, group in zip(counts, holds, groups.values(), strict=True):
        holders = random.permutation(np.flatnonzero(held))  # who gets one more is left to chance
        row[holders] = [len(part) for part in np.array_split(group, len(holders))]
    return _deal(groups, counts, random)


def natural_id(keys: Sequence[str], num_clients: int | None = None, min_size: int = 1) -> Partition:
    """One client for each value, in order; values with fewer than `min_size` examples are left out.

    Raises DataError if that leaves none, or another number than `num_clients`.
    """
    groups = {value: group.tolist() for value, group in _group(keys).items()}
    kept = {value: group for value, group in groups.items() if len(group) >= min_size}
    if not kept or num_clients not in (None, len(kept)):
        wanted = "at least 1" if num_clients is None else num_clients
        raise DataError(
            f"num_clients: expected {wanted} for partition natural-id, the data has {len(kept)} values with "
            f"{min_size} examples or more"
        )
    left_out = [index for value, group in groups.items() if value not in kept for index in group]
    return Partition(list(kept.values()), list(kept), left_out)


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _group(keys: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """value -> the indices of its examples; values in order."""
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return {key: np.array(groups[key], dtype=np.int64) for key in sorted(groups)}


def _draw_counts(
    random: np.random.Generator, sizes: Sequence[int], num_clients: int, alpha: float, balanced: bool
) -> Counts:
    """How many examples of each value each client gets: [values, clients]."""
    counts = np.zeros((len(sizes), num_clients), dtype=np.int64)
    for row, size in zip(counts, sizes, strict=True):
        shares = random.dirichlet(np.full(num_clients, alpha))
        if balanced:
            open_ = counts.sum(0) < sum(sizes) / num_clients
            shares = shares * open_
            if shares.sum() == 0:  # all shares of those who may take some rounded to nothing
                shares = open_.astype(float)
        ends = (np.cumsum(shares) / shares.sum() * size).astype(np.int64).clip(max=size)
        ends[-1] = size
        row[:] = np.diff(ends, prepend=0)
    return counts


def _deal(groups: dict[str, NDArray[np.int64]], counts: Counts, random: np.random.Generator) -> Parts:
    """The parts that have counts[value, client] examples, drawn at random within each value."""
    parts: Parts = [[] for _ in range(counts.shape[1])]
    for group, row in zip(groups.values(), counts, strict=True):
        pieces = np.split(random.permutation(group), np.cumsum(row)[:-1])
        for part, piece in zip(parts, pieces, strict=True):
            part += piece.tolist()
    return parts


def _known(kind: str, keys: Sequence[str] | None) -> Sequence[str]:
    if keys is None:
        raise DataError(f"partition.column: expected a column for partition {kind}, got none")
    return keys


def _check_enough(num_examples: int, num_clients: int, min_size: int) -> None:
    if num_examples < num_clients * min_size:
        each = f" with {min_size} for each" if min_size > 1 else ""
        raise DataError(
            f"num_clients: expected at most {num_examples // min_size} for {num_examples} training "
            f"examples{each}, got {num_clients}"
        )
