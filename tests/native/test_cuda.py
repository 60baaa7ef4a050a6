"""CUDA against the CPU, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import BASES, DTYPES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, Packing, from_host

pytestmark = pytest.mark.cuda

SEED = 0xFE44E7
# offset, numel, count, K: whole blocks and shards, aligned and not, in one node of the tree and over several
PLACES = [
    (0, None, 1, 1),
    (3 * 512 + 77, None, 511, 64),
    (0, None, 4096, 65),
    (2**40 + 640, 2**41, 40001, 130),
    (2**62 + 1, None, 2000, 300),
    (63 * 512, None, 300000, 5),
]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(params=[*((basis, "simt") for basis in BASES), ("rademacher", "mma")], ids="-".join)
def basis(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kind, and the one that matrix units know on them too."""
    kind, path = request.param
    monkeypatch.setenv("FERRET_CUDA_PATH", path)
    return str(kind)


def place_of(case: tuple[int, int | None, int, int], basis: str) -> tuple[dict[str, Any], int, int]:
    offset, numel, count, K = case
    return {"basis": basis, "offset": offset, "numel": numel}, count, K


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PLACES)
def test_cuda_project_is_the_cpus(
    case: tuple[int, int | None, int, int], dtype: torch.dtype, basis: str
) -> None:
    place, count, K = place_of(case, basis)
    delta = normal(count, 1, dtype)
    got = ferret_ext.project(delta.cuda(), SEED, K, **place)
    assert got.is_cuda
    assert_same_bits(got.cpu(), ferret_ext.project(delta, SEED, K, **place))


def test_cuda_unknown_path_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRET_CUDA_PATH", "fast")
    with pytest.raises(RuntimeError, match="FERRET_CUDA_PATH, which must be simt or mma"):
        ferret_ext.project(normal(100).cuda(), SEED, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PLACES)
def test_cuda_reconstruct_is_the_cpus(
    case: tuple[int, int | None, int, int], dtype: torch.dtype, basis: str
) -> None:
    place, count, K = place_of(case, basis)
    gamma = normal(K, 2)
    got = ferret_ext.reconstruct(gamma.cuda(), SEED, count, dtype=dtype, **place)
    assert got.is_cuda
    assert_same_bits(got.cpu(), ferret_ext.reconstruct(gamma, SEED, count, dtype=dtype, **place))
    moved = ferret_ext.reconstruct(gamma, SEED, count, dtype=dtype, device="cuda", **place)
    assert_same_bits(moved.cpu(), got.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PLACES)
def test_cuda_reconstruct_inplace_is_the_cpus(
    case: tuple[int, int | None, int, int], dtype: torch.dtype, basis: str
) -> None:
    place, count, K = place_of(case, basis)
    gamma, there = normal(K, 2), normal(count, 3, dtype).cuda()
    ferret_ext.reconstruct_(there, gamma.cuda(), SEED, alpha=-0.3, **place)
    here = ferret_ext.reconstruct_(normal(count, 3, dtype), gamma, SEED, alpha=-0.3, **place)
    assert_same_bits(there.cpu(), here)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 7, 2**32 - 1])
def test_cuda_basis_is_the_cpus(k: int, dtype: torch.dtype, basis: str) -> None:
    place = {"basis": basis, "offset": 3 * 512 + 77, "numel": 12345, "dtype": dtype}
    got = ferret_ext.basis(SEED, k, (70, 100), device="cuda", **place)
    assert_same_bits(got.cpu(), ferret_ext.basis(SEED, k, (70, 100), **place))


@pytest.mark.parametrize("scale", [2.0**-140, 1e-20, 1e20, 1e30])
def test_cuda_agrees_at_the_ends_of_the_range(scale: float, basis: str) -> None:
    """Denormal and huge numbers, and one element 1e6 times the rest."""
    delta = normal(3000, 4, torch.float64) * scale
    delta[1234] *= 1e6
    narrow, gamma = delta.float(), (normal(100, 5, torch.float64) * scale).float()
    assert_same_bits(
        ferret_ext.project(narrow.cuda(), SEED, 9, basis=basis).cpu(),
        ferret_ext.project(narrow, SEED, 9, basis=basis),
    )
    assert_same_bits(
        ferret_ext.reconstruct(gamma.cuda(), SEED, 3000, basis=basis).cpu(),
        ferret_ext.reconstruct(gamma, SEED, 3000, basis=basis),
    )


def model(seed: int, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    return [normal(n, seed + i, dtypes[i % len(dtypes)]) for i, n in enumerate((30000, 5, 1, 700, 2048, 513))]


@pytest.mark.parametrize("granularity", ["tensor", "packed", 1000])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32, torch.float16), DTYPES])
def test_cuda_plan_operators_are_the_cpus(
    granularity: str | int, dtypes: tuple[torch.dtype, ...], basis: str
) -> None:
    named = [(f"p{i}", tensor.requires_grad_()) for i, tensor in enumerate(model(0, (torch.float32,)))]
    plan = BlockPlan.from_parameters(named, 300, granularity=granularity)
    old, new = model(100, dtypes), model(200, dtypes)
    gammas = ferret_ext.project_difference(plan, old, new, SEED, basis=basis)
    there = [[tensor.cuda() for tensor in tensors] for tensors in (old, new)]
    assert_same_bits(ferret_ext.project_difference(plan, *there, SEED, basis=basis).cpu(), gammas)
    updates = [(1, gammas, 0.5), (2, gammas.flip(0), -0.25), (3, gammas * 1e-3, 2.0)]
    ferret_ext.apply_(plan, new, updates, 0.1, basis=basis)
    ferret_ext.apply_(plan, there[1], [(seed, g.cuda(), w) for seed, g, w in updates], 0.1, basis=basis)
    for got, expected in zip(there[1], new, strict=True):
        assert_same_bits(got.cpu(), expected)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32, torch.float16), DTYPES])
def test_cuda_project_difference_from_host_memory(
    pinned: bool, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_host, "RUN_BYTES", 5000)  # several runs
    named = [(f"p{i}", tensor.requires_grad_()) for i, tensor in enumerate(model(0, (torch.float32,)))]
    plan = BlockPlan.from_parameters(named, 300, granularity=1000)
    old, new = model(100, dtypes), model(200, dtypes)
    expected = ferret_ext.project_difference(plan, old, new, SEED)
    old, new = [x.pin_memory() if pinned else x for x in old], [x.cuda() for x in new]
    for _ in range(3):
        assert_same_bits(ferret_ext.project_difference(plan, old, new, SEED).cpu(), expected)
    with pytest.raises(ValueError, match=r"old\['p1'\] must be on the device of old\['p0'\], cpu, got cuda"):
        ferret_ext.project_difference(plan, [old[0], *new[1:]], new, SEED)


@pytest.mark.parametrize("pinned", [True, False])
def test_cuda_project_difference_from_host_memory_heeds_the_current_stream(
    pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a side stream, where `new` is written late, with what the buffers hold now before them."""
    monkeypatch.setattr(from_host, "RUN_BYTES", 5000)  # several runs
    dtypes = (torch.bfloat16, torch.float32)
    old, new = model(100, dtypes), model(200, dtypes)
    plan = plan_of([part.numel() for part in new], 300)
    expected = ferret_ext.project_difference(plan, old, [2 * part for part in new], SEED)
    old, there = [x.pin_memory() if pinned else x for x in old], [x.cuda() for x in new]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for part in there:
            part.mul_(2)
        got = ferret_ext.project_difference(plan, old, there, SEED)
    stream.synchronize()
    assert_same_bits(got.cpu(), expected)


def plan_of(lengths: list[int], K: int) -> BlockPlan:
    return BlockPlan.from_parameters(
        [(f"p{i}", torch.zeros(n, requires_grad=True)) for i, n in enumerate(lengths)], K
    )


def test_cuda_project_difference_from_host_memory_keeps_no_copy() -> None:
    """Two runs of 64 MiB are all that it takes beside the model, here on a stream of its own."""
    count, numel = 40, 1 << 22
    new = [normal(numel, i % 3).cuda() for i in range(count)]
    old = [part.cpu().neg().pin_memory() for part in new]
    plan = plan_of([numel] * count, 4 * count)
    expected = ferret_ext.project_difference(plan, old, [part.cpu() for part in new], SEED)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = ferret_ext.project_difference(plan, old, new, SEED).cpu()
    assert_same_bits(got, expected)
    assert torch.cuda.max_memory_allocated() - before < sum(part.nbytes for part in new) / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_stochastic_rounding_is_the_cpus(dtype: torch.dtype, basis: str) -> None:
    lengths = [3000, 17, 5000]
    here = list(torch.split(normal(sum(lengths), 1, dtype), lengths))
    there = [part.cuda() for part in here]
    plan = plan_of(lengths, 200)
    row = normal(plan.K, 2)
    ferret_ext.apply_(plan, here, [(5, row, 0.5)], 0.1, basis=basis, rounding_seed=7)
    ferret_ext.apply_(plan, there, [(5, row.cuda(), 0.5)], 0.1, basis=basis, rounding_seed=7)
    for a, b in zip(there, here, strict=True):
        assert_same_bits(a.cpu(), b)
    place: dict[str, Any] = {"basis": basis, "offset": 3 * 512 + 77, "numel": 12345}
    ferret_ext.reconstruct_(here[0], row, SEED, alpha=-0.3, rounding_seed=-1, **place)
    ferret_ext.reconstruct_(there[0], row.cuda(), SEED, alpha=-0.3, rounding_seed=-1, **place)
    assert_same_bits(there[0].cpu(), here[0])


@two_gpus
def test_cuda_works_on_a_device_that_is_not_the_current_one(basis: str) -> None:
    delta, gamma = normal(9000), normal(70, 1)
    with torch.cuda.device(0):
        got = ferret_ext.project(delta.to("cuda:1"), SEED, 70, basis=basis)
        rebuilt = ferret_ext.reconstruct(gamma.to("cuda:1"), SEED, 9000, basis=basis)
    assert got.device.index == rebuilt.device.index == 1
    assert_same_bits(got.cpu(), ferret_ext.project(delta, SEED, 70, basis=basis))
    assert_same_bits(rebuilt.cpu(), ferret_ext.reconstruct(gamma, SEED, 9000, basis=basis))


@two_gpus
@pytest.mark.parametrize("on_host", [False, True])
def test_cuda_plan_operators_work_on_a_device_that_is_not_the_current_one(
    on_host: bool, basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_host, "RUN_BYTES", 5000)  # several runs
    old, new = model(100, (torch.float32,)), model(200, (torch.float32,))
    plan = plan_of([part.numel() for part in new], 300)
    there = [part.to("cuda:1") for part in new]
    before = [part.pin_memory() if on_host else part.to("cuda:1") for part in old]
    gammas = ferret_ext.project_difference(plan, old, new, SEED, basis=basis)
    with torch.cuda.device(0):
        got = ferret_ext.project_difference(plan, before, there, SEED, basis=basis)
        ferret_ext.apply_(plan, there, [(SEED, got, 0.5)], 0.1, basis=basis)
        ferret_ext.reconstruct_(there[0], got, SEED, basis=basis)
    assert got.device.index == 1
    assert_same_bits(got.cpu(), gammas)
    ferret_ext.apply_(plan, new, [(SEED, gammas, 0.5)], 0.1, basis=basis)
    ferret_ext.reconstruct_(new[0], gammas, SEED, basis=basis)
    for a, b in zip(there, new, strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("packing", [Packing(1), Packing(4), Packing(8), Packing(1, 8)], ids=str)
def test_cuda_apply_of_packed_coordinates_is_the_cpus(packing: Packing, basis: str) -> None:
    named = [(f"p{i}", tensor.requires_grad_()) for i, tensor in enumerate(model(0, (torch.float32,)))]
    plan = BlockPlan.from_parameters(named, 300)
    there, here = [[tensor.to(device) for tensor in model(1, DTYPES)] for device in ("cuda", "cpu")]
    updates = [
        (seed, ferret_ext.pack(plan, normal(plan.K << packing.choice, seed), packing), 0.5) for seed in (1, 2)
    ]
    ferret_ext.apply_(plan, here, updates, 0.1, basis=basis)
    ferret_ext.apply_(plan, there, [(seed, p.to("cuda"), w) for seed, p, w in updates], 0.1, basis=basis)
    for got, expected in zip(there, here, strict=True):
        assert_same_bits(got.cpu(), expected)


def test_cuda_results_are_the_same_when_repeated(basis: str) -> None:
    delta = normal(500000).cuda()
    expected = ferret_ext.project(delta, SEED, 200, basis=basis)
    for _ in range(5):
        assert_same_bits(ferret_ext.project(delta, SEED, 200, basis=basis), expected)


def test_cuda_strided_tensors_work() -> None:
    x = normal(3000).view(50, 60)
    assert_same_bits(ferret_ext.project(x.cuda().T, SEED, 9).cpu(), ferret_ext.project(x.T, SEED, 9))
    there, here = x.cuda()[:, ::3], x.clone()[:, ::3]
    ferret_ext.reconstruct_(there, normal(9).cuda(), SEED)
    assert_same_bits(there.cpu(), ferret_ext.reconstruct_(here, normal(9), SEED))


def test_cuda_uses_the_current_stream() -> None:
    """Work queued on a side stream before the operator must be seen by it."""
    delta = normal(100000)
    expected = ferret_ext.project(delta * 2, SEED, 50)
    stream = torch.cuda.Stream()
    there = delta.cuda()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        there.mul_(2)
        got = torch.ops.ferret.project(there, SEED, 50, 1, 0, there.numel())
    stream.synchronize()
    assert_same_bits(got.cpu(), expected)


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and the tensor to which replays write its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # what is loaded or allocated once
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_cuda_graph_replays_single_tensor_operators(basis: str) -> None:
    """The graph reads its inputs anew, and needs nothing that the host has freed or written over."""
    delta, gamma = normal(10000).cuda(), normal(70, 1).cuda()
    param = normal(10000, 2).cuda()
    project, projected = capture(lambda: ferret_ext.project(delta, SEED, 70, basis=basis))
    rebuild, rebuilt = capture(lambda: ferret_ext.reconstruct(gamma, SEED, 10000, basis=basis))
    update, _ = capture(lambda: ferret_ext.reconstruct_(param, gamma, SEED, basis=basis))
    draw, column = capture(lambda: ferret_ext.basis(SEED, 3, 10000, basis=basis, device="cuda"))
    for seed in (8, 9):
        delta.copy_(normal(10000, seed))
        gamma.copy_(normal(70, seed))
        param.copy_(normal(10000, 2))
        for tensor in (projected, rebuilt, column):
            tensor.fill_(float("nan"))
        for graph in (project, rebuild, update, draw):
            graph.replay()
        here = {"basis": basis}
        assert_same_bits(projected.cpu(), ferret_ext.project(normal(10000, seed), SEED, 70, **here))
        assert_same_bits(rebuilt.cpu(), ferret_ext.reconstruct(normal(70, seed), SEED, 10000, **here))
        assert_same_bits(
            param.cpu(), ferret_ext.reconstruct_(normal(10000, 2), normal(70, seed), SEED, **here)
        )
        assert_same_bits(column.cpu(), ferret_ext.basis(SEED, 3, 10000, **here))


@pytest.mark.parametrize("count", [6, 900])
def test_cuda_graph_replays_plan_operators(count: int) -> None:
    """900 blocks: their tables are larger than the parameters of one kernel."""
    lengths = [3000 + 7 * (i % 50) for i in range(count)]
    plan = plan_of(lengths, 3 * count)

    def tensors(seed: int, device: str = "cpu") -> list[Tensor]:
        return [part.to(device) for part in torch.split(normal(sum(lengths), seed), lengths)]

    old, new, gammas = tensors(1, "cuda"), tensors(2, "cuda"), normal(plan.K, 3).cuda()
    updates = [(1, gammas, 0.5), (2, gammas, -0.25)]
    project, projected = capture(lambda: ferret_ext.project_difference(plan, old, new, SEED))
    update, _ = capture(lambda: ferret_ext.apply_(plan, new, updates, 0.1))
    for seed in (8, 9):
        for there, here in zip(
            [*old, *new, gammas], [*tensors(seed), *tensors(5), normal(plan.K, seed)], strict=True
        ):
            there.copy_(here)
        project.replay()
        update.replay()
        expected = tensors(5)
        assert_same_bits(projected.cpu(), ferret_ext.project_difference(plan, tensors(seed), expected, SEED))
        row = normal(plan.K, seed)
        ferret_ext.apply_(plan, expected, [(1, row, 0.5), (2, row, -0.25)], 0.1)
        for there, here in zip(new, expected, strict=True):
            assert_same_bits(there.cpu(), here)


def test_cuda_not_finite_is_an_error_and_leaves_parameters_untouched() -> None:
    delta = normal(7000).cuda()
    delta[4321] = float("nan")
    with pytest.raises(ValueError, match=r"delta must be finite.*1 of 7000.*index 4321"):
        ferret_ext.project(delta, SEED, 9)
    gamma, param = normal(9).cuda(), normal(700).cuda()
    gamma[3] = float("inf")
    with pytest.raises(ValueError, match=r"gamma must be finite.*1 of 9.*index 3"):
        ferret_ext.reconstruct_(param, gamma, SEED)
    assert_same_bits(param.cpu(), normal(700))


def test_cuda_and_cpu_tensors_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"gamma.*param.*cuda:0.*got cpu"):
        ferret_ext.reconstruct_(normal(700).cuda(), normal(9), SEED)


def test_cuda_zero_length_gives_zeros() -> None:
    empty = torch.zeros(0, device="cuda")
    assert_same_bits(ferret_ext.project(empty, SEED, 6).cpu(), torch.zeros(6))
    assert ferret_ext.reconstruct(normal(6).cuda(), SEED, 0).shape == (0,)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_cuda_opcheck(kind: int) -> None:
    torch.library.opcheck(
        torch.ops.ferret.project, (normal(600).cuda().requires_grad_(), 5, 9, kind, 77, 1000)
    )
    gamma = normal(9).cuda().requires_grad_()
    torch.library.opcheck(torch.ops.ferret.reconstruct, (gamma, 5, 600, kind, 77, 1000, torch.float32))


def test_cuda_gradcheck() -> None:
    delta = normal(60, dtype=torch.float64).cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ferret_ext.project(x, 5, 7), delta)
    gamma = normal(7, dtype=torch.float64).cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: ferret_ext.reconstruct(g, 5, 60, dtype=torch.float64), gamma)
