"""Numbers beyond 2^31, 2^32 and 2^40, in address space of which little is backed by memory."""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import BASES, DTYPES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, reference

OPS = torch.ops.ferret
PASSES = [2**31 + 2**25, pytest.param(2**32 + 2**25, marks=pytest.mark.slow)]  # elements, all of them visited


def virtual(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [2**31, 2**32, 2**40])
def test_elements_of_a_plan_beyond_32_bits(place: int, dtype: torch.dtype) -> None:
    """The last block of a tensor of up to 8 TB has the coordinates and the update of its elements alone."""
    whole, end = virtual(place + 900, dtype), normal(1000, 1, dtype)
    whole[-1000:] = end
    plan = BlockPlan(
        (("x", len(whole)),),
        (ferret_ext.Block("head", 0, place - 100, 1), ferret_ext.Block("tail", 2**41, 1000, 20)),
    )
    tables, pieces = plan.blocks_table, plan.pieces_table[1:]
    assert pieces.tolist() == [[0, place - 100, 1000, 2**41, 1]]
    gammas = OPS.project_blocks([whole], [], tables, pieces, plan.K, 5, 1)
    alone = ferret_ext.project(end, 5, 20, offset=2**41)
    assert_same_bits(gammas, torch.cat([gammas.new_zeros(1), alone]))

    OPS.apply_blocks_([whole], tables, pieces, gammas[None], [5], [1.0], -0.5, 1)
    ferret_ext.reconstruct_(end, alone, 5, alpha=-0.5, offset=2**41)
    assert_same_bits(whole[-1000:], end)
    assert not whole[-2000:-1000].any()


@pytest.mark.parametrize("basis", BASES)
def test_offsets_up_to_the_last_element_of_a_stream(isa: str, basis: str) -> None:
    """The last shard of a block of 2^63 - 1 elements, against the reference in plain torch."""
    delta, last = normal(3000), {"basis": basis, "offset": 2**63 - 1 - 3000, "numel": 2**63 - 1}
    gamma = ferret_ext.project(delta, 5, 9, **last)
    assert_same_bits(gamma, reference.project(delta, 5, 9, **last))
    rebuilt = ferret_ext.reconstruct(gamma, 5, 3000, **last)
    assert_same_bits(rebuilt, reference.reconstruct(gamma, 5, (3000,), **last))
    assert_same_bits(ferret_ext.reconstruct(gamma, 5, 1, **last | {"offset": 2**63 - 2}), rebuilt[-1:])


@pytest.mark.parametrize("numel", PASSES)
def test_project_of_so_many_elements(numel: int) -> None:
    """An update that is zero but at its ends and within has the sum of their coordinates, as shards."""
    delta = virtual(numel, torch.bfloat16)
    gamma = torch.zeros(1)
    for start in (0, 2**30 - 999, numel - 1000):
        delta[start : start + 1000] = torch.randn(1000)
        gamma += ferret_ext.project(delta[start : start + 1000], 5, 1, offset=start, numel=numel)
    torch.testing.assert_close(ferret_ext.project(delta, 5, 1), gamma, rtol=1e-6, atol=0)


def test_parameters_in_a_sparse_file_are_changed_in_the_file(tmp_path: Path) -> None:
    """A file of 16 GB, of which a few pages are on the disk."""
    path, numel = tmp_path / "weights", 2**33
    with path.open("wb") as file:
        file.truncate(2 * numel)
    weights = torch.from_file(str(path), shared=True, size=numel, dtype=torch.bfloat16)
    tail = {"offset": numel - 1000, "numel": numel}
    ferret_ext.reconstruct_(weights[-1000:], normal(9), 5, **tail)
    expected = ferret_ext.reconstruct(normal(9), 5, 1000, dtype=torch.bfloat16, **tail)
    with path.open("rb") as file:
        file.seek(-2000, os.SEEK_END)
        assert file.read() == expected.view(torch.uint8).numpy().tobytes()
    assert path.stat().st_blocks * 512 < 2**20


WINDOW = 2**24  # elements


@pytest.fixture(params=PASSES)
def folded(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """A tensor that is the same WINDOW of memory over and over."""
    size = 2 * request.param
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    protection, fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10  # MAP_FIXED
    base = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * WINDOW)
        for start in range(0, size, 2 * WINDOW):
            at = libc.mmap(base + start, 2 * WINDOW, protection, mmap.MAP_SHARED | fixed, file.fileno(), 0)
            assert at == base + start
    yield torch.frombuffer((ctypes.c_char * size).from_address(base), dtype=torch.bfloat16)
    libc.munmap(base, size)


def test_reconstruct_in_place_of_so_many_elements(folded: Tensor, restored_threads: None) -> None:
    """Every window adds its part of the update to the same memory, as the shards do one after the other."""
    torch.set_num_threads(1)  # a single thread goes from the first element to the last
    alone, gamma = normal(WINDOW, 1, torch.bfloat16), torch.tensor([0.7])
    folded[:WINDOW] = alone
    ferret_ext.reconstruct_(folded, gamma, 5, alpha=1e3)
    for start in range(0, len(folded), WINDOW):
        ferret_ext.reconstruct_(alone, gamma, 5, alpha=1e3, offset=start, numel=len(folded))
    assert_same_bits(folded[-WINDOW:], alone)
