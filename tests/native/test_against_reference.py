"""The native code against the plain-torch reference, bit for bit, on whatever hypothesis thinks of."""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BASES, DTYPES, assert_same_bits
from torch import Tensor

import ferret_ext
from ferret_ext import Block, BlockPlan, reference

EXAMPLES = 40

bases = st.sampled_from(BASES)
dtypes = st.sampled_from(DTYPES)
seeds = st.one_of(st.sampled_from([0, 1, -1, 2**63, 2**64 - 1, -(2**63)]), st.integers(-(2**63), 2**64 - 1))
columns = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 128, 129]), st.integers(1, 140))
lengths = st.one_of(st.sampled_from([1, 127, 128, 129, 511, 512, 513, 1024, 4097]), st.integers(1, 1600))
offsets = st.one_of(
    st.sampled_from([0, 1, 511, 512, 3 * 512 + 77, 63 * 512, 2**40 + 640]), st.integers(0, 2**63 - 2**20)
)
shapes = st.lists(st.integers(0, 24), max_size=3).map(tuple)


@st.composite
def places(draw: st.DrawFn, count: int) -> dict[str, Any]:
    """basis, offset and numel for `count` elements."""
    numel = draw(st.one_of(st.none(), st.integers(count, count + 5000), st.integers(count, 2**63 - 1)))
    return {"basis": draw(bases), "offset": draw(offsets), "numel": numel}


@st.composite
def values(draw: st.DrawFn, count: int, dtype: torch.dtype) -> Tensor:
    """Finite numbers of a scale anywhere in the dtype's range, alike or widely spread, perhaps some zeros.

    The upper end is left out, so that coordinates and their sums fit the working precision.
    """
    info = torch.finfo(dtype)
    lowest, highest = math.frexp(info.smallest_normal)[1] - 8, math.frexp(info.max)[1]
    if dtype == torch.float64:
        lowest, highest = -300, 300  # the reference's fma is exact where the product's error is a float64 too
    elif dtype != torch.float16:
        highest -= 70
    scale = draw(st.one_of(st.just(0), st.integers(lowest, highest - 3)))
    spread = draw(st.sampled_from([0, 3, 20, 60]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(count, generator=random, dtype=torch.float64).clamp(-7, 7)
    x = x * torch.exp2(scale - spread * torch.rand(count, generator=random, dtype=torch.float64))
    if draw(st.booleans()):
        x[torch.rand(count, generator=random) < 0.3] = 0
    return x.clamp(-info.max, info.max).to(dtype)


@st.composite
def strided(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """A tensor of up to three dimensions: dense, transposed, sliced, with a gap in front, or expanded."""
    shape = draw(shapes)
    kind = draw(st.sampled_from(["dense", "transposed", "sliced", "shifted", "expanded"]))
    if kind == "transposed":
        return (
            draw(values(math.prod(shape), dtype))
            .reshape(shape[::-1])
            .permute(tuple(reversed(range(len(shape)))))
        )
    if kind == "sliced" and shape:
        return draw(values(2 * math.prod(shape), dtype)).reshape(*shape[:-1], 2 * shape[-1])[..., 1::2]
    if kind == "shifted":
        return draw(values(3 + math.prod(shape), dtype))[3:].reshape(shape)
    if kind == "expanded" and shape:
        return draw(values(shape[-1], dtype)).expand(shape)
    return draw(values(math.prod(shape), dtype)).reshape(shape)


@settings(max_examples=EXAMPLES)
@given(st.data(), lengths, columns, seeds, dtypes)
def test_project_is_the_reference(
    data: st.DataObject, count: int, K: int, seed: int, dtype: torch.dtype
) -> None:
    delta, place = data.draw(values(count, dtype)), data.draw(places(count))
    assert_same_bits(ferret_ext.project(delta, seed, K, **place), reference.project(delta, seed, K, **place))


@settings(max_examples=EXAMPLES)
@given(st.data(), lengths, columns, seeds, dtypes, dtypes)
def test_reconstruct_is_the_reference(
    data: st.DataObject, count: int, K: int, seed: int, gamma_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    gamma, place = data.draw(values(K, gamma_dtype)), data.draw(places(count))
    got = ferret_ext.reconstruct(gamma, seed, count, dtype=dtype, **place)
    assert_same_bits(got, reference.reconstruct(gamma, seed, (count,), dtype=dtype, **place))


@settings(max_examples=EXAMPLES)
@given(st.data(), dtypes, columns, seeds)
def test_strided_tensors_give_what_the_reference_gives(
    data: st.DataObject, dtype: torch.dtype, K: int, seed: int
) -> None:
    delta = data.draw(strided(dtype))
    place = data.draw(places(delta.numel()))
    gamma = ferret_ext.project(delta, seed, K, **place)
    assert_same_bits(gamma, reference.project(delta, seed, K, **place))
    got = ferret_ext.reconstruct(gamma, seed, delta.shape, dtype=dtype, **place)
    assert_same_bits(got, reference.reconstruct(gamma, seed, delta.shape, dtype=dtype, **place))


@settings(max_examples=EXAMPLES)
@given(st.data(), dtypes, dtypes, columns, seeds, st.sampled_from([1.0, -0.3, 0.0, 1e-4, 1e4]))
def test_reconstruct_inplace_is_the_reference(
    data: st.DataObject, dtype: torch.dtype, gamma_dtype: torch.dtype, K: int, seed: int, alpha: float
) -> None:
    """Dense and strided parameters; torch refuses to change expanded ones, whose elements share memory."""
    param = data.draw(
        strided(dtype).filter(lambda x: all(x.stride(i) or x.shape[i] <= 1 for i in range(x.dim())))
    )
    gamma, place = data.draw(values(K, gamma_dtype)), data.draw(places(param.numel()))
    expected = reference.reconstruct_(param.clone(), gamma, seed, alpha=alpha, **place)
    assert_same_bits(ferret_ext.reconstruct_(param, gamma, seed, alpha=alpha, **place), expected)


@settings(max_examples=EXAMPLES)
@given(st.data(), lengths, seeds, st.integers(0, 2**32 - 1), dtypes)
def test_basis_is_the_reference(
    data: st.DataObject, count: int, seed: int, k: int, dtype: torch.dtype
) -> None:
    place = data.draw(places(count))
    got = ferret_ext.basis(seed, k, count, dtype=dtype, **place)
    assert_same_bits(got, reference.basis(seed, k, (count,), dtype=dtype, **place))


@st.composite
def plans(draw: st.DrawFn) -> BlockPlan:
    """Any cut of any tensors into blocks."""
    sizes = draw(st.lists(st.integers(1, 1500), min_size=1, max_size=5))
    total = sum(sizes)
    cuts = draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=4)) if total > 1 else set()
    ends = [*sorted(cuts), total]
    blocks, offset = [], 512 * draw(st.integers(0, 2**40))
    for begin, end in zip([0, *ends], ends, strict=False):
        blocks.append(Block(f"block{begin}", offset, end - begin, draw(st.integers(1, 90))))
        offset += -(-(end - begin) // 512) * 512 + 512 * draw(st.integers(0, 3))
    return BlockPlan(tuple((f"t{i}", size) for i, size in enumerate(sizes)), tuple(blocks))


@settings(max_examples=EXAMPLES)
@given(st.data(), plans(), seeds, bases)
def test_project_difference_is_the_reference(
    data: st.DataObject, plan: BlockPlan, seed: int, basis: str
) -> None:
    """Old and new may differ in dtype, from tensor to tensor too."""
    kinds = data.draw(st.lists(dtypes, min_size=1, max_size=3))
    old, new = (
        [data.draw(values(numel, data.draw(st.sampled_from(kinds)))) for _, numel in plan.tensors]
        for _ in range(2)
    )
    got = ferret_ext.project_difference(plan, old, new, seed, basis=basis)
    assert_same_bits(got, reference.project_difference(plan, old, new, seed, basis=basis))


@settings(max_examples=EXAMPLES)
@given(st.data(), plans(), bases, st.integers(1, 3))
def test_apply_is_the_reference(data: st.DataObject, plan: BlockPlan, basis: str, count: int) -> None:
    kinds = data.draw(st.lists(dtypes, min_size=1, max_size=3))
    params = [data.draw(values(numel, data.draw(st.sampled_from(kinds)))) for _, numel in plan.tensors]
    updates = [
        (data.draw(seeds), data.draw(values(plan.K, data.draw(dtypes))), data.draw(st.floats(-3, 3)))
        for _ in range(count)
    ]
    alpha = data.draw(st.floats(-2, 2))
    expected = [param.clone() for param in params]
    reference.apply_(plan, expected, updates, alpha, basis=basis)
    ferret_ext.apply_(plan, params, updates, alpha, basis=basis)
    for got, wanted in zip(params, expected, strict=True):
        assert_same_bits(got, wanted)


def test_reconstruct_of_what_underflows_keeps_its_sign() -> None:
    """A fused multiply-add onto 0 rounds a negative number that is too small to -0.0."""
    gamma = torch.tensor([2.0**-149])
    got = ferret_ext.reconstruct(gamma, 1, 700, numel=2**40)
    assert_same_bits(got, reference.reconstruct(gamma, 1, (700,), numel=2**40))
    assert got.signbit().any()
    assert not got.signbit().all()


def test_apply_of_updates_of_unlike_sizes_is_the_reference() -> None:
    """Updates whose block exponents lie as far apart as they can, 1024 powers of two in float64."""
    plan = BlockPlan((("p", 700),), (Block("p", 0, 700, 9),))
    for exponents, dtype in (
        ((-600, 600), torch.float64),
        ((-511, 511), torch.float64),
        ((-140, 70), torch.float32),
    ):
        updates = [(seed, torch.full((9,), 1.5).to(dtype) * 2.0**e, 0.5) for seed, e in enumerate(exponents)]
        got, expected = [torch.ones(700, dtype=dtype)], [torch.ones(700, dtype=dtype)]
        reference.apply_(plan, expected, updates, 2.0**-60)
        ferret_ext.apply_(plan, got, updates, 2.0**-60)
        assert expected[0].isfinite().all()
        assert_same_bits(got[0], expected[0])
