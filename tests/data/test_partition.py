"""Dealing out examples: every kind's properties, known answers, and what cannot be done."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferret_ext.federated.config import PartitionConfig
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.partition import dirichlet, divide, iid, natural_id, pathological, sized

KINDS = ["iid", "dirichlet", "natural-id", "pathological", "linear", "square", "exponential"]
seeds = st.integers(0, 2**64 - 1)
columns = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=300)


def config(**settings_: Any) -> PartitionConfig:
    return PartitionConfig(**{"min_size": 1, "alpha": 1.0, **settings_})


def labels(sizes: dict[str, int]) -> list[str]:
    """Keys with these frequencies, in a mixed order."""
    return np.random.default_rng(0).permutation([key for key, n in sizes.items() for _ in range(n)]).tolist()


@given(st.integers(1, 300), st.integers(1, 20), seeds)
def test_iid_deals_out_every_example_once_and_evenly(examples: int, clients: int, seed: int) -> None:
    clients = min(clients, examples)
    parts = iid(examples, clients, seed)
    assert sorted(i for part in parts for i in part) == list(range(examples))
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", KINDS)
@given(columns, st.integers(1, 12), seeds, st.data())
def test_every_kind_assigns_every_example_once(
    kind: str, keys: list[str], clients: int, seed: int, data: st.DataObject
) -> None:
    clients = min(clients, len(keys))
    values = len(set(keys))
    classes = data.draw(st.integers(-(-values // clients), values))
    chosen = config(classes_per_client=classes, min_size=0)
    number = None if kind == "natural-id" else clients
    partition = divide(kind, len(keys), keys, number, chosen, seed)
    assert sorted(i for part in partition.parts for i in part) == list(range(len(keys)))
    assert all(partition.parts)
    assert partition.left_out == []
    if number is not None:
        assert len(partition.parts) + partition.empty == clients
    assert divide(kind, len(keys), keys, number, chosen, seed) == partition


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "natural-id"])
def test_parts_depend_on_the_seed(kind: str) -> None:
    keys = labels({"a": 60, "b": 60, "c": 60})
    first, second = (divide(kind, len(keys), keys, 4, config(), seed) for seed in (7, 8))
    assert first.parts != second.parts


@given(st.sampled_from(["linear", "square", "exponential"]), st.integers(1, 12), st.integers(0, 9), seeds)
def test_sizes_grow_and_none_is_below_the_least(kind: str, clients: int, least: int, seed: int) -> None:
    sizes = [len(part) for part in sized(kind, 130, clients, seed, least)]
    assert sum(sizes) == 130
    assert min(sizes) >= least
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("kind", "examples", "sizes"),
    [
        ("linear", 60, [10, 20, 30]),
        ("square", 140, [10, 40, 90]),
        ("exponential", 1000, [90, 244, 666]),  # e^i / (e + e^2 + e^3) is 9.003 %, 24.473 %, 66.524 %
    ],
)
def test_sizes_are_those_of_the_formula(kind: str, examples: int, sizes: list[int]) -> None:
    assert [len(part) for part in sized(kind, examples, 3, 0)] == sizes


def test_exponential_takes_a_thousand_clients() -> None:
    sizes = [len(part) for part in sized("exponential", 5000, 1000, 0)]
    assert sizes[:900] == [1] * 900
    assert sum(sizes) == 5000


def reference_dirichlet(keys: list[str], clients: int, seed: int, alpha: float) -> list[dict[str, int]]:
    """Counts by client, written from the definition; the loop's draws are the only thing in common."""
    random = np.random.Generator(np.random.PCG64(seed))
    while True:
        held: list[dict[str, int]] = [{} for _ in range(clients)]
        for value, count in sorted(Counter(keys).items()):
            share = random.dirichlet([alpha] * clients)
            full = [sum(h.values()) >= len(keys) / clients for h in held]
            share = [0 if f else s for f, s in zip(full, share, strict=True)]
            given_, passed = 0, 0.0
            for i in range(clients):
                passed += share[i] / sum(share)
                end = count if i == clients - 1 else int(passed * count)
                held[i][value] = end - given_
                given_ = end
        if min(sum(h.values()) for h in held) >= 10:
            return held


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_dirichlet_gives_the_counts_of_its_definition(alpha: float) -> None:
    keys = labels({"a": 500, "b": 300, "c": 90, "d": 400})
    parts = dirichlet(keys, 20, 3, alpha)
    held = [Counter(keys[i] for i in part) for part in parts]
    wanted = reference_dirichlet(keys, 20, 3, alpha)
    assert [{value: h[value] for value in "abcd"} for h in held] == wanted


def test_dirichlet_balances_only_when_asked() -> None:
    keys = labels({"a": 400, "b": 400})
    mean = len(keys) / 10
    for balanced in (True, False):
        parts = dirichlet(keys, 10, 5, 0.3, 1, balanced=balanced)
        first = [sum(keys[i] == "a" for i in part) for part in parts]
        again = [sum(keys[i] == "b" for i in part) for part in parts]
        assert any(a >= mean for a in first)
        late = [b for a, b in zip(first[:-1], again[:-1], strict=True) if a >= mean]
        assert (not any(late)) == balanced


def skew(parts: list[list[int]], keys: list[str]) -> float:
    """The mean over the clients of the share of their commonest value."""
    return float(
        np.mean([max(Counter(keys[i] for i in part).values()) / len(part) for part in parts if part])
    )


def test_dirichlet_is_the_more_skewed_the_smaller_alpha() -> None:
    keys = labels({"a": 300, "b": 300, "c": 300, "d": 300})
    skews = [skew(dirichlet(keys, 10, 1, alpha, 1), keys) for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.7
    assert skews[-1] == pytest.approx(0.25, abs=0.05)


@given(seeds, st.sampled_from([0.3, 1.0, 5.0]), st.booleans())
@settings(max_examples=30)
def test_dirichlet_keeps_the_least_size(seed: int, alpha: float, balanced: bool) -> None:
    keys = labels({"a": 200, "b": 150, "c": 250})
    parts = dirichlet(keys, 8, seed, alpha, 10, balanced=balanced)
    assert min(len(part) for part in parts) >= 10


def test_dirichlet_deals_the_papers_dolly() -> None:
    """Its training records by category, 200 clients, 10 records at least."""
    sizes = {"brainstorming": 1766, "classification": 2136, "closed_qa": 1773, "creative_writing": 709}
    sizes |= {"general_qa": 2191, "information_extraction": 1506, "open_qa": 3742}
    keys = labels(sizes)
    for alpha in (0.5, 5.0):
        parts = divide("dirichlet", len(keys), keys, 200, PartitionConfig(alpha=alpha), 0).parts
        assert len(parts) == 200
        assert min(len(part) for part in parts) >= 10
        assert sum(len(part) for part in parts) == 13_823


@given(st.integers(1, 6), st.integers(1, 30), seeds)
def test_pathological_clients_hold_that_many_values(classes: int, clients: int, seed: int) -> None:
    keys = labels(dict.fromkeys("abcdef", 60))
    if classes * clients < 6:
        with pytest.raises(DataError, match="classes_per_client: expected"):
            pathological(keys, clients, seed, classes)
        return
    parts = pathological(keys, clients, seed, classes)
    assert [len({keys[i] for i in part}) for part in parts] == [classes] * clients
    holders = Counter(value for part in parts for value in {keys[i] for i in part})
    assert set(holders) == set("abcdef")
    assert max(holders.values()) - min(holders.values()) <= 1
    for value in "abcdef":
        shares = [n for part in parts if (n := sum(keys[i] == value for i in part))]
        assert max(shares) - min(shares) <= 1


def test_pathological_with_all_values_is_stratified() -> None:
    keys = labels({"a": 40, "b": 20})
    for part in pathological(keys, 10, 0, 2):
        assert Counter(keys[i] for i in part) == {"a": 4, "b": 2}


@given(columns)
def test_natural_id_gives_each_value_a_client(keys: list[str]) -> None:
    partition = natural_id(keys)
    assert partition.names == sorted(set(keys))
    for name, part in zip(partition.names, partition.parts, strict=True):
        assert {keys[i] for i in part} == {name}


def test_natural_id_leaves_out_small_values_and_says_which() -> None:
    partition = natural_id(["b", "a", "b", "c", "a"], min_size=2)
    assert partition.names == ["a", "b"]
    assert partition.parts == [[1, 4], [0, 2]]
    assert partition.left_out == [3]


def test_empty_clients_take_no_part() -> None:
    partition = divide("exponential", 20, None, 10, config(min_size=0), 0)
    assert partition.empty == 10 - len(partition.parts) > 0
    assert all(partition.parts)


@pytest.mark.parametrize(
    ("kind", "clients", "settings_", "message"),
    [
        ("iid", 10, {}, "num_clients: expected at most 9 for 9 training examples, got 10"),
        ("linear", 4, {"min_size": 3}, "at most 3 for 9 training examples with 3 for each, got 4"),
        ("iid", None, {}, "num_clients: expected a number for partition iid, got none"),
        ("natural-id", 2, {}, "num_clients: expected 2 for partition natural-id, the data has 3 values"),
        ("natural-id", None, {"min_size": 9}, "at least 1 for partition natural-id, the data has 0 values"),
        ("pathological", 2, {"classes_per_client": 1}, "expected 2 to 3 for 3 values and 2 clients, got 1"),
        ("pathological", 2, {"classes_per_client": 4}, "expected 2 to 3 for 3 values and 2 clients, got 4"),
        (
            "pathological",
            4,
            {"min_size": 2, "classes_per_client": 1},
            r"at least 2 examples for each client, client \d of 4 has 1$",
        ),
        (
            "dirichlet",
            3,
            {"alpha": 1e-9, "min_size": 3, "self_balancing": False},
            "none of 1000 draws gave 3 of the 9 examples to",
        ),
        ("dirichlet", 2, {"min_size": None}, "at most 0 for 9 training examples with 10 for each, got 2"),
    ],
)
def test_divide_says_what_cannot_be_done(
    kind: str, clients: int | None, settings_: dict[str, Any], message: str
) -> None:
    keys = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    with pytest.raises(DataError, match=message):
        divide(kind, 9, keys, clients, config(**settings_), 0)


@pytest.mark.parametrize("kind", ["dirichlet", "natural-id", "pathological"])
def test_divide_needs_the_column_of_a_kind_by_column(kind: str) -> None:
    with pytest.raises(DataError, match=f"partition.column: expected a column for partition {kind}"):
        divide(kind, 9, None, 2, config(), 0)
