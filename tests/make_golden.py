"""Writes tests/golden.txt, the known answers of the stream contract, from the plain-torch reference.

    python tests/make_golden.py > tests/golden.txt

The file says what its lines mean. It changes only with the contract's version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from torch import Tensor

from ferret_ext import reference
from ferret_ext.known_answers import DTYPES, inputs, result
from ferret_ext.plan import Block, BlockPlan

FORMAT = """\
Known answers of stream contract version 1 (docs/streams.md), written by tests/make_golden.py.

Every line is `record arguments : values`, tokens between single spaces; a line that begins with '#' is a
comment. A basis is named rademacher, uniform or gaussian, a dtype f32, bf16, f16 or f64. Seeds, words, bit
patterns and inputs are hex; other integers, alpha and weight are decimal.

philox c0 c1 c2 c3 key0 key1 : w0 w1 w2 w3
words seed basis t k : w0 w1 w2 w3
integers seed basis offset count k : b(offset, k) .. b(offset + count - 1, k), decimal
basis dtype basis seed k offset numel count : result
project dtype basis seed offset numel count K input : result
reconstruct dtype basis seed offset numel count K input gamma-dtype : result
apply dtype basis offset count K input gamma-dtype alpha N, N times `seed weight gamma-input` : result
round rounding-seed, and as apply : result

`offset` and `numel` are a shard's place in its block and the block's length; `count` is the shard's own
length. `dtype` is that of the column, of delta, of the reconstruction, of the parameter.

An `input` starts a generator of exact test data for delta, the parameter or gamma: from x = input, every
element takes x = x * 6364136223846793005 + 1442695040888963407 mod 2^64 and is (h - 2^(p-1)) 2^-(p-1+e), h
being the upper p bits of x, e = (x >> 5) mod 8, and p = 24 for f32, 8 for bf16, 11 for f16, 53 for f64.

A `result` is a checksum and at most the first 8 values as bit patterns. The checksum is FNV-1a over whole
values: from cbf29ce484222325, for every value's bit pattern, (checksum xor pattern) * 100000001b3 mod 2^64.
"""

BASES = tuple(reference.KINDS)
SEEDS = (0, 1, 0x0123456789ABCDEF, 2**64 - 1)
UNALIGNED, FAR = 3 * 512 + 77, 2**40 + 640


def hex_words(words: Sequence[Tensor]) -> str:
    return " ".join(f"{int(word):08x}" for word in words)


def philox_records() -> Iterator[str]:
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for words in ([0] * 6, [0xFFFFFFFF] * 6, pi):
        arguments = " ".join(f"{word:08x}" for word in words)
        yield f"philox {arguments} : {hex_words(reference.philox(words[:4], (words[4], words[5])))}"


def word_records() -> Iterator[str]:
    for seed, basis, (t, k) in product(SEEDS, BASES, ((0, 0), (1, 2), (2**33 + 5, 7), (3, 2**32 - 1))):
        yield f"words {seed:x} {basis} {t} {k} : {hex_words(reference.words(seed, basis, t, k))}"


def integer_records() -> Iterator[str]:
    for basis, (offset, k), seed in product(
        BASES, ((0, 0), (UNALIGNED, 1), (2**39 + 101, 3), (FAR, 70000)), SEEDS[1:3]
    ):
        values = reference.integers(seed, basis, offset, 24, range(k, k + 1))[0].long().tolist()
        yield f"integers {seed:x} {basis} {offset} 24 {k} : {' '.join(map(str, values))}"


def basis_records() -> Iterator[str]:
    for basis, dtype in product(BASES, DTYPES):
        seed, k, offset, numel, count = 0x5EED, 5, UNALIGNED, 100003, 700
        v = reference.basis(seed, k, (count,), basis=basis, offset=offset, numel=numel, dtype=DTYPES[dtype])
        yield f"basis {dtype} {basis} {seed:x} {k} {offset} {numel} {count} : {result(v)}"


def places() -> Iterator[tuple[int, int, int, int]]:
    """offset, numel, count, K: small and large, aligned and not, whole blocks and shards."""
    yield 0, 1, 1, 1
    yield UNALIGNED, 1, 1, 5
    yield 0, 511, 511, 64
    yield FAR, 511, 511, 65
    yield UNALIGNED, 2000, 2000, 100
    yield FAR, 2**41, 2000, 5
    yield 2**62 + 12345, 3000, 2000, 1


def project_records() -> Iterator[str]:
    cases = list(product(DTYPES, BASES, places()))
    cases += [("f32", basis, (UNALIGNED, 70000, 70000, 64)) for basis in BASES]
    cases += [
        ("bf16", "rademacher", (0, 70000, 70000, 100)),
        ("f64", "rademacher", (64 * 512 - 9, 70000, 70000, 3)),
    ]
    for index, (dtype, basis, (offset, numel, count, K)) in enumerate(cases):
        seed, start = SEEDS[index % 4], 1000 + index
        gamma = reference.project(
            inputs(start, count, dtype), seed, K, basis=basis, offset=offset, numel=numel
        )
        yield f"project {dtype} {basis} {seed:x} {offset} {numel} {count} {K} {start:x} : {result(gamma)}"


def reconstruct_records() -> Iterator[str]:
    cases = list(product(DTYPES, BASES, places(), ["f32"]))
    cases += list(product(["f32", "f64"], BASES, [(UNALIGNED, 511, 511, 4200)], ["f32", "f64"]))
    cases += [("f32", basis, (UNALIGNED, 70000, 70000, 5), "f32") for basis in BASES]
    for index, (dtype, basis, (offset, numel, count, K), gamma_dtype) in enumerate(cases):
        seed, start = SEEDS[index % 4], 2000 + index
        gamma = inputs(start, K, gamma_dtype)
        rebuilt = reference.reconstruct(
            gamma, seed, (count,), basis=basis, offset=offset, numel=numel, dtype=DTYPES[dtype]
        )
        arguments = f"{dtype} {basis} {seed:x} {offset} {numel} {count} {K} {start:x} {gamma_dtype}"
        yield f"reconstruct {arguments} : {result(rebuilt)}"


def apply_record(
    dtype: str,
    basis: str,
    place: tuple[int, int, int],
    gamma_dtype: str,
    index: int,
    rounding_seed: int | None,
) -> str:
    offset, length, K = place
    start, alpha = 3000 + index, (-0.3, 1.0)[index % 2]
    updates = [(SEEDS[2], 0.5, 4000 + index), (SEEDS[3], -0.1, 5000 + index)]
    plan = BlockPlan((("param", length),), (Block("param", offset, length, K),))
    param = inputs(start, length, dtype)
    received = [(seed, inputs(gamma_start, K, gamma_dtype), weight) for seed, weight, gamma_start in updates]
    reference.apply_(plan, [param], received, alpha, basis=basis, rounding_seed=rounding_seed)
    arguments = f"{dtype} {basis} {offset} {length} {K} {start:x} {gamma_dtype} {alpha} {len(updates)}"
    listed = " ".join(f"{seed:x} {weight} {gamma_start:x}" for seed, weight, gamma_start in updates)
    return f"{arguments} {listed} : {result(param)}"


def apply_records() -> Iterator[str]:
    cases = product(DTYPES, BASES, ((3 * 512, 2000, 100), (2**40 + 1024, 511, 1)), ["f32", "f64"])
    for index, case in enumerate(cases):
        yield f"apply {apply_record(*case, index, None)}"


def round_records() -> Iterator[str]:
    places = ((3 * 512, 2000, 100), (2**40 + 1024, 511, 1), (512, 1100, 12))
    for index, case in enumerate(product(["bf16", "f16"], BASES, places, ["f32", "f64"])):
        seed = SEEDS[index % 4]
        yield f"round {seed:x} {apply_record(*case, 100 + index, seed)}"


def main() -> None:
    for line in FORMAT.splitlines():
        print(f"# {line}".rstrip())
    for records in (
        philox_records,
        word_records,
        integer_records,
        basis_records,
        project_records,
        reconstruct_records,
        apply_records,
        round_records,
    ):
        print("\n".join(records()))


if __name__ == "__main__":
    main()
