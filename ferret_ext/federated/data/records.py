"""Records that know where they stand, and the book-keeping of those that are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LISTED = 20  # places kept for each reason


class Record(dict[str, Any]):
    """Columns by name. `place` says where they stand, e.g. "train.jsonl line 7" or "list.json[6]"."""

    __slots__ = ("place",)

    def __init__(self, columns: Mapping[str, Any], place: str) -> None:
        super().__init__(columns)
        self.place = place

    def having(self, columns: Mapping[str, Any]) -> Record:
        """The record with these columns, too."""
        return Record({**self, **columns}, self.place)


def place_of(record: Mapping[str, Any], index: int) -> str:
    """Where a record stands; its number, from 1 on, where it does not know."""
    return record.place if isinstance(record, Record) else f"record {index + 1}"


@dataclass
class Tally:
    """Counts by reason, and the places of the first records of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str | None = None, count: int = 1) -> None:
        """`count` records more, at `place` if that is worth telling."""
        if count == 0:
            return
        self.counts[reason] += count
        if place is not None and len(known := self.places.setdefault(reason, [])) < LISTED:
            known.append(place)

    def __add__(self, other: Tally) -> Tally:
        both = {
            reason: [*self.places.get(reason, []), *other.places.get(reason, [])][:LISTED]
            for reason in (*self.places, *other.places)
        }
        return Tally(self.counts + other.counts, both)

    def where(self, reason: str) -> str:
        """The first place in brackets, after a blank; nothing where none is known."""
        known = self.places.get(reason, [])
        return f" (first: {known[0]})" if known else ""

    @classmethod
    def of_dict(cls, told: Mapping[str, Any]) -> Tally:
        """What `as_dict` gave."""
        counts = {reason: int(it["count"]) for reason, it in told.items()}
        return cls(Counter(counts), {reason: list(map(str, it["places"])) for reason, it in told.items()})

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """reason -> count and places, for JSON."""
        return {
            reason: {"count": count, "places": self.places.get(reason, [])}
            for reason, count in self.counts.items()
        }


@dataclass
class Count:
    """What became of a split's records. indices: those kept, as they stood when they were tokenised."""

    indices: list[int] = field(default_factory=list)
    cut: Tally = field(default_factory=Tally)  # kept, but cut at max_length
    dropped: Tally = field(default_factory=Tally)

    @property
    def kept(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        long = "cut to length"
        parts = [f"{self.kept:,} records, {self.cut.counts[long]:,} {long}{self.cut.where(long)}"]
        for reason, number in self.dropped.counts.items():
            parts.append(f"{number:,} {reason} dropped{self.dropped.where(reason)}")
        return ", ".join(parts)

    @classmethod
    def of_dict(cls, told: Mapping[str, Any]) -> Count:
        """What `as_dict` gave, but for which records they were."""
        return cls(list(range(told["kept"])), Tally.of_dict(told["cut"]), Tally.of_dict(told["dropped"]))

    def as_dict(self) -> dict[str, Any]:
        """Numbers of records read and kept, and who was cut or dropped, for JSON."""
        return {
            "read": self.kept + self.dropped.counts.total(),
            "kept": self.kept,
            "cut": self.cut.as_dict(),
            "dropped": self.dropped.as_dict(),
        }
