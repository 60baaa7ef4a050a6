"""The native code and the plain-torch reference against the known answers of tests/golden.txt."""

from pathlib import Path

import pytest
import torch
from make_golden import DTYPES, inputs, result
from support import BASES

import ferret_ext
from ferret_ext import Block, BlockPlan, _native, reference

KIND = {basis: number for number, basis in enumerate(BASES, start=1)}


def records(name: str) -> list[pytest.param]:
    """(arguments, values) of every line of one record type."""
    lines = (Path(__file__).parents[1] / "golden.txt").read_text().splitlines()
    found = [line.split(" : ") for line in lines if line.startswith(f"{name} ")]
    assert found, f"golden.txt has no {name} records"
    return [pytest.param(left.split()[1:], right, id=left.replace(" ", "-")) for left, right in found]


def cases(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("arguments", "values"), records(name))


def hex_words(words: list[int]) -> str:
    return " ".join(f"{int(word):08x}" for word in words)


@cases("philox")
def test_philox_matches_random123(arguments: list[str], values: str) -> None:
    words = [int(word, 16) for word in arguments]
    assert hex_words(_native.philox(words[:4], *words[4:])) == values
    assert hex_words(reference.philox(words[:4], (words[4], words[5]))) == values


@cases("words")
def test_words_match_golden(arguments: list[str], values: str) -> None:
    seed, basis, t, k = int(arguments[0], 16), arguments[1], int(arguments[2]), int(arguments[3])
    assert hex_words(_native.words(seed, KIND[basis], t, k)) == values
    assert hex_words(reference.words(seed, basis, t, k)) == values


@cases("integers")
def test_integers_match_golden(arguments: list[str], values: str) -> None:
    seed, basis = int(arguments[0], 16), arguments[1]
    offset, count, k = map(int, arguments[2:])
    expected = list(map(int, values.split()))
    assert _native.integers(seed, KIND[basis], offset, count, k) == expected
    assert reference.integers(seed, basis, offset, count, range(k, k + 1))[0].tolist() == expected


@cases("basis")
def test_basis_matches_golden(isa: str, arguments: list[str], values: str) -> None:
    dtype, basis, seed = DTYPES[arguments[0]], arguments[1], int(arguments[2], 16)
    k, offset, numel, count = map(int, arguments[3:])
    v = ferret_ext.basis(seed, k, (count,), basis=basis, offset=offset, numel=numel, dtype=dtype)
    assert result(v) == values


@cases("project")
def test_project_matches_golden(isa: str, arguments: list[str], values: str) -> None:
    dtype, basis, seed = arguments[0], arguments[1], int(arguments[2], 16)
    offset, numel, count, K = map(int, arguments[3:7])
    delta = inputs(int(arguments[7], 16), count, dtype)
    assert result(ferret_ext.project(delta, seed, K, basis=basis, offset=offset, numel=numel)) == values


@cases("reconstruct")
def test_reconstruct_matches_golden(isa: str, arguments: list[str], values: str) -> None:
    dtype, basis, seed = DTYPES[arguments[0]], arguments[1], int(arguments[2], 16)
    offset, numel, count, K = map(int, arguments[3:7])
    gamma = inputs(int(arguments[7], 16), K, arguments[8])
    place = {"offset": offset, "numel": numel}
    assert result(ferret_ext.reconstruct(gamma, seed, (count,), basis=basis, dtype=dtype, **place)) == values


@cases("apply")
def test_apply_matches_golden(isa: str, arguments: list[str], values: str) -> None:
    dtype, basis = arguments[0], arguments[1]
    offset, count, K = map(int, arguments[2:5])
    start, gamma_dtype, alpha = int(arguments[5], 16), arguments[6], float(arguments[7])
    triples = [arguments[i : i + 3] for i in range(9, len(arguments), 3)]
    assert len(triples) == int(arguments[8])
    updates = [
        (int(seed, 16), inputs(int(gamma, 16), K, gamma_dtype), float(w)) for seed, w, gamma in triples
    ]
    param = inputs(start, count, dtype)
    plan = BlockPlan((("param", count),), (Block("param", offset, count, K),))
    with torch.no_grad():
        ferret_ext.apply_(plan, [param], updates, alpha, basis=basis)
    assert result(param) == values
