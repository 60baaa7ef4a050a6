"""Who holds what: a partition's counts by client and by key, and what became of all records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ferret_ext.federated.data.partition import Partition
from ferret_ext.federated.data.records import Count


@dataclass(frozen=True)
class Holdings:
    """The training examples of each client.

    kind: of the partition. column: whose values are the keys; None where there are none. sizes: examples by
    client. by_key: the same by key. names: the client's value, with natural-id. empty: clients that got
    nothing and take no part. lost: values of which no example is left. training, evaluation: what became of
    the records. evaluated: of the latter, how many are used.
    """

    kind: str
    column: str | None
    sizes: list[int]
    by_key: list[dict[str, int]]
    names: list[str] | None
    empty: int
    lost: list[str]
    training: Count
    evaluation: Count
    evaluated: int

    @property
    def keys(self) -> dict[str, int]:
        """Examples by key over all clients, the most frequent key first; ties in alphabetical order."""
        totals: Counter[str] = Counter()
        for held in self.by_key:
            totals.update(held)
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        by = f" by {self.column}, {len(self.keys):,} values" if self.keys else ""
        low, high, middle = min(self.sizes), max(self.sizes), median(self.sizes)
        sizes = f"{low:,} to {high:,}, median {middle:,g}" if low < high else f"{low:,}"
        text = f"partition: {self.kind}{by}; clients: {len(self.sizes):,}; training examples of each: {sizes}"
        if single := self.sizes.count(1):
            text += f"; {single:,} with one only"
        if self.empty:
            text += f"; {self.empty:,} more got none and take no part"
        if self.lost:
            text += f"; {len(self.lost):,} more values have no example left (first: {self.lost[0]})"
        return text

    @classmethod
    def of_dict(cls, told: Mapping[str, Any]) -> Holdings:
        """What `as_dict` gave. Raises KeyError, TypeError or ValueError if it is something else."""
        names = [client["name"] for client in told["clients"]]
        return cls(
            kind=str(told["kind"]),
            column=None if told["column"] is None else str(told["column"]),
            sizes=[int(client["examples"]) for client in told["clients"]],
            by_key=[{key: int(n) for key, n in client["by_key"].items()} for client in told["clients"]],
            names=None if None in names else list(map(str, names)),
            empty=int(told["empty_clients"]),
            lost=list(map(str, told["lost_keys"])),
            training=Count.of_dict(told["training"]),
            evaluation=Count.of_dict(told["evaluation"]),
            evaluated=int(told["evaluation"]["evaluated"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names: Sequence[str | None] = self.names or [None] * len(self.sizes)
        clients = [
            {"client": client, "name": name, "examples": size, "by_key": held}
            for client, (name, size, held) in enumerate(zip(names, self.sizes, self.by_key, strict=True))
        ]
        return {
            "kind": self.kind,
            "column": self.column,
            "num_clients": len(self.sizes),
            "empty_clients": self.empty,
            "keys": self.keys,
            "lost_keys": self.lost,
            "clients": clients,
            "training": self.training.as_dict(),
            "evaluation": {**self.evaluation.as_dict(), "evaluated": self.evaluated},
        }


def counts_by_key(partition: Partition, keys: Sequence[str] | None) -> list[dict[str, int]]:
    """Each client's examples by key, in the keys' order; keys: each example's."""
    counts = [Counter(keys[i] for i in part) if keys else Counter() for part in partition.parts]
    return [dict(sorted(count.items())) for count in counts]
