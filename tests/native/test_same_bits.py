"""Nothing but (seed, basis, j, k) enters an element: not slicing, threads, instruction set or repetition."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import BASES, DTYPES, TILE, assert_same_bits, normal
from torch import Tensor

import ferret_ext

SEED = 0xFE44E7
OFFSETS = (0, 512, 3 * 512 + 77, 2**40 + 640, 2**62 + 1)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("basis", BASES)
def test_basis_slice_of_stream_is_stream_of_slice(isa: str, basis: str, offset: int) -> None:
    whole = ferret_ext.basis(SEED, 3, 3000, basis=basis, offset=offset)
    for start, stop in ((0, 1), (1, 2), (127, 131), (500, 1700), (2999, 3000)):
        part = ferret_ext.basis(SEED, 3, stop - start, basis=basis, offset=offset + start, numel=3000)
        assert_same_bits(part, whole[start:stop])


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("basis", BASES)
def test_reconstruct_slice_of_stream_is_stream_of_slice(isa: str, basis: str, offset: int) -> None:
    gamma = normal(100)
    whole = ferret_ext.reconstruct(gamma, SEED, 3000, basis=basis, offset=offset)
    for start, stop in ((0, 1), (1, 2), (127, 131), (500, 1700), (2999, 3000)):
        part = ferret_ext.reconstruct(
            gamma, SEED, stop - start, basis=basis, offset=offset + start, numel=3000
        )
        assert_same_bits(part, whole[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstruct_inplace_slice_is_slice_of_whole(isa: str, dtype: torch.dtype) -> None:
    gamma, param = normal(70), normal(2500, 1, dtype)
    part = param[700:1300].clone()
    ferret_ext.reconstruct_(param, gamma, SEED, alpha=-0.3, offset=99)
    ferret_ext.reconstruct_(part, gamma, SEED, alpha=-0.3, offset=99 + 700, numel=2500)
    assert_same_bits(part, param[700:1300])


@pytest.mark.parametrize("basis", BASES)
def test_project_zeros_outside_a_slice_change_nothing(isa: str, basis: str) -> None:
    """A slice has the coordinates of the whole with zeros around it."""
    delta = torch.zeros(5000)
    delta[1024:3000] = normal(1976)
    whole = ferret_ext.project(delta, SEED, 40, basis=basis)
    part = ferret_ext.project(delta[1024:3000], SEED, 40, basis=basis, offset=1024, numel=5000)
    assert_same_bits(part, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_project_shards_add_up(basis: str, dtype: torch.dtype) -> None:
    """To rounding only: each shard is within 1e-5 of its own exact coordinates, and so is the whole."""
    delta, offset = normal(40000, dtype=dtype), 2**40 + 640
    place = {"basis": basis, "numel": 40000}
    whole = ferret_ext.project(delta, SEED, 100, offset=offset, **place)
    starts = range(0, 40000, 7001)
    shards = [
        ferret_ext.project(delta[start : start + 7001], SEED, 100, offset=offset + start, **place)
        for start in starts
    ]
    bound = 1e-5 * (whole.norm() + sum(shard.norm() for shard in shards))
    assert (torch.stack(shards).sum(0) - whole).norm() <= bound


def results(basis: str, dtype: torch.dtype) -> list[Tensor]:
    """One of everything, over several tiles, spans and groups of columns."""
    delta, gamma = normal(35000, 1, dtype), normal(70, 2)
    place = {"basis": basis, "offset": 3 * 512 + 77, "numel": 50000}
    return [
        ferret_ext.project(delta, SEED, 70, **place),
        ferret_ext.reconstruct(gamma, SEED, delta.shape, dtype=dtype, **place),
        ferret_ext.reconstruct_(delta.clone(), gamma, SEED, alpha=0.3, **place),
        ferret_ext.basis(SEED, 69, delta.shape, dtype=dtype, **place),
    ]


@pytest.fixture(
    params=[(basis, dtype) for basis in BASES for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def compute(request: pytest.FixtureRequest) -> Callable[[], list[Tensor]]:
    return lambda: results(*request.param)


def test_results_are_the_same_for_every_number_of_threads(
    compute: Callable[[], list[Tensor]], restored_threads: None
) -> None:
    torch.set_num_threads(1)
    expected = compute()
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        for got, one_thread in zip(compute(), expected, strict=True):
            assert_same_bits(got, one_thread)


def test_results_are_the_same_for_every_instruction_set(
    compute: Callable[[], list[Tensor]], restored_isa: None
) -> None:
    first, *others = ferret_ext.cpu_capability()["available"]
    if not others:
        pytest.skip(f"this processor has one path only, {first}")
    ferret_ext.set_cpu_isa(first)
    expected = compute()
    for isa in others:
        ferret_ext.set_cpu_isa(isa)
        assert ferret_ext.cpu_capability()["isa"] == isa
        for got, scalar in zip(compute(), expected, strict=True):
            assert_same_bits(got, scalar)


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.3, 1e4, -3e38, 1e-30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_converted_the_same_way(
    dtype: torch.dtype, alpha: float, restored_isa: None
) -> None:
    """Denormals, infinities and NaNs too, with updates that overflow and underflow."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    results = []
    for isa in ferret_ext.cpu_capability()["available"]:
        ferret_ext.set_cpu_isa(isa)
        param = patterns.clone().view(dtype)
        ferret_ext.reconstruct_(param, torch.tensor([1.5, -0.25, 3.0]), SEED, alpha=alpha)
        results.append(param.view(torch.int16))
    assert all(torch.equal(result, results[0]) for result in results)


def test_results_are_the_same_when_repeated(compute: Callable[[], list[Tensor]]) -> None:
    expected = compute()
    for _ in range(3):
        for got, first in zip(compute(), expected, strict=True):
            assert_same_bits(got, first)


def test_project_on_many_threads_at_once_gives_the_same_bits() -> None:
    """Callers' own threads share the processor's threads, and nothing else."""
    delta = normal(30000)
    expected = [ferret_ext.project(delta, seed, 70) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: ferret_ext.project(delta, seed, 70), range(8)))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("basis", BASES)
def test_seeds_and_columns_beyond_32_bits_matter(basis: str) -> None:
    columns = [
        ferret_ext.basis(seed, k, 256, basis=basis, offset=offset)
        for seed, k, offset in (
            (1, 0, 0),
            (1 + 2**32, 0, 0),
            (1, 1, 0),
            (1, 2**31, 0),
            (1, 0, 2**40),
            (1, 0, 2**61),
        )
    ]
    for i, a in enumerate(columns):
        for b in columns[:i]:
            assert (a != b).any()


def test_seed_negative_stands_for_seed_plus_2_to_64() -> None:
    delta = normal(600)
    assert_same_bits(ferret_ext.project(delta, -1, 9), ferret_ext.project(delta, 2**64 - 1, 9))
    assert_same_bits(ferret_ext.project(delta, -(2**63), 9), ferret_ext.project(delta, 2**63, 9))


TILES = {  # what is done to normal numbers
    "ordinary": lambda x, dtype: x,
    "denormal": lambda x, dtype: x * torch.finfo(dtype).smallest_normal / 16,
    "too small for one scale": lambda x, dtype: x * torch.finfo(dtype).smallest_normal * 4,
    "rounds up to a power of two": lambda x, dtype: x.sign() * (1 - torch.finfo(dtype).eps / 2),
    "huge": lambda x, dtype: x * (torch.finfo(dtype).max / 2**16),
}


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 7, 8, 31, 48, 49])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TILES)
def test_tiles_of_every_kind(isa: str, kind: str, dtype: torch.dtype, K: int) -> None:
    """Whole, partial and zero tiles of a tensor, of differences, and of differences between two dtypes."""
    new, old = (TILES[kind](normal(9 * TILE + 100, seed).double(), dtype).to(dtype) for seed in (1, 2))
    for x in (new, old):
        x[TILE : 2 * TILE] = 0
    whole, part = (
        ferret_ext.Block("whole", 0, 6 * TILE, K),
        ferret_ext.Block("part", 6 * TILE, 3 * TILE + 100, K),
    )
    plan = ferret_ext.BlockPlan((("x", len(new)),), (whole, part))

    mixed = {torch.float32: torch.bfloat16, torch.float64: torch.float64}.get(dtype, torch.float32)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        return (
            ferret_ext.project(new, SEED, K),
            ferret_ext.project_difference(plan, [old], [new], SEED),
            ferret_ext.project_difference(plan, [old.to(mixed)], [new], SEED),
        )

    got = results()
    ferret_ext.set_cpu_isa("scalar")
    for result, expected in zip(got, results(), strict=True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("K", [1, 4, 8, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_other_kinds_among_ordinary_ones(isa: str, dtype: torch.dtype, K: int) -> None:
    """Tiles that need another way lie between long stretches that do not, in each place of four."""
    x = normal(150 * TILE + 100).double()
    for i, change in enumerate(TILES.values()):
        tile = slice((29 * i + 3) * TILE, (29 * i + 4) * TILE)
        x[tile] = change(x[tile], dtype)
    x = x.to(dtype)
    spoilt = x.clone()
    spoilt[140 * TILE] = torch.inf
    with pytest.raises(ValueError, match="must be finite"):
        ferret_ext.project(spoilt, SEED, K)
    got = ferret_ext.project(x, SEED, K)
    ferret_ext.set_cpu_isa("scalar")
    assert_same_bits(got, ferret_ext.project(x, SEED, K))
