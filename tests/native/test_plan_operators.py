"""project_difference and apply_ over whole plans, in terms of the operators on single blocks."""

import contextlib

import pytest
import torch
from support import BASES, DTYPES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, from_host
from ferret_ext.plan import AnyPlan

SEED = 31
NUMELS = (3000, 5, 1, 700, 2048, 513)


def parameters(seed: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Tensor]:
    return [normal(numel, seed + i, dtypes[i % len(dtypes)]) for i, numel in enumerate(NUMELS)]


@pytest.fixture(params=["tensor", "packed", 1000])
def plan(request: pytest.FixtureRequest) -> BlockPlan:
    named = [(f"p{i}", parameter.requires_grad_()) for i, parameter in enumerate(parameters(0))]
    return BlockPlan.from_parameters(named, 90, granularity=request.param)


def blocks_of(plan: BlockPlan, tensors: list[Tensor]) -> list[Tensor]:
    """The concatenation of the tensors, cut into the plan's blocks."""
    return list(torch.cat(tensors).split([block.numel for block in plan.blocks]))


@pytest.mark.parametrize("basis", BASES)
def test_project_difference_is_project_of_each_block(isa: str, plan: BlockPlan, basis: str) -> None:
    old, new = parameters(100), parameters(200)
    gammas = ferret_ext.project_difference(plan, old, new, SEED, basis=basis)
    deltas = blocks_of(plan, [before - after for before, after in zip(old, new, strict=True)])
    for gamma, delta, block in zip(plan.split(gammas), deltas, plan.blocks, strict=True):
        expected = ferret_ext.project(delta, SEED, block.k, basis=basis, offset=block.offset)
        assert_same_bits(gamma, expected)


@pytest.mark.parametrize("nbytes", [1, 4000, 1 << 20])
@pytest.mark.parametrize("part", ["whole", "shard"])
def test_runs_of_blocks_by_way_of_a_buffer_have_the_coordinates_of_one_call(
    plan: BlockPlan, nbytes: int, part: str
) -> None:
    here: AnyPlan = plan
    if part == "shard":  # of which some blocks have nothing
        here = plan.shard([(numel // 3, numel // 3 if i % 2 else numel) for i, numel in enumerate(NUMELS)])
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    old, new = (
        [x[:numel] for x, (_, numel) in zip(parameters(seed, dtypes), here.tensors, strict=True)]
        for seed in (100, 200)
    )
    runs = list(from_host.cut(here, old, new, nbytes))
    buffer = torch.empty(max(run.room for run in runs), dtype=torch.uint8)
    gammas = []
    for run in runs:
        brought = from_host.fill(buffer, run.old)
        gammas.append(from_host.project_run(run, brought, projected, new[0], torch.float32))
        assert len(run.blocks) == 1 or sum(x.nbytes for x in run.old) <= nbytes
    assert_same_bits(torch.cat(gammas), ferret_ext.project_difference(here, old, new, SEED))


class Queue:
    """Stands in for a CUDA stream and remembers what it had to wait for."""

    def __init__(self, *_: object) -> None:
        self.waits: list[str] = []

    def wait_stream(self, other: "Queue") -> None:
        self.waits.append("stream")

    def wait_event(self, event: str) -> None:
        self.waits.append(event)

    def record_event(self) -> str:
        self.waits.append("work")
        return f"run {self.waits.count('work') - 1}"


def test_a_buffer_is_filled_again_only_after_its_run(
    plan: BlockPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues = [Queue(), Queue()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queues[0])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: queues[1])
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(from_host, "RUN_BYTES", 4000)
    old, new = parameters(100), parameters(200)
    runs = len(list(from_host.cut(plan, old, new, 4000)))
    gammas = from_host.project(plan, old, new, projected)
    assert_same_bits(gammas, ferret_ext.project_difference(plan, old, new, SEED))
    assert queues[0].waits == ["stream", "work"] * runs
    assert queues[1].waits == ["stream", *(f"run {i}" for i in range(runs - 2))]
    assert runs > 2


def projected(now: list[Tensor], then: list[Tensor], blocks: Tensor, pieces: Tensor, K: int) -> Tensor:
    return torch.ops.ferret.project_blocks(now, then, blocks, pieces, K, SEED, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("basis", BASES)
def test_apply_of_one_update_is_reconstruct_inplace_of_each_block(
    isa: str, plan: BlockPlan, basis: str
) -> None:
    params, gammas = parameters(300), normal(plan.K, 1)
    expected = blocks_of(plan, params)
    for values, gamma, block in zip(expected, plan.split(gammas), plan.blocks, strict=True):
        ferret_ext.reconstruct_(values, gamma, SEED, alpha=-0.3, basis=basis, offset=block.offset)
    assert ferret_ext.apply_(plan, params, [(SEED, gammas, 1.0)], -0.3, basis=basis) is None
    assert_same_bits(torch.cat(params), torch.cat(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_of_many_updates_is_their_weighted_sum(plan: BlockPlan, dtype: torch.dtype) -> None:
    """Within one rounding to dtype and 1e-6 of each update."""
    weights = (0.5, -1.25, 0.1, 3.0)
    updates = [(seed, normal(plan.K, seed), weight) for seed, weight in enumerate(weights)]
    params = parameters(400, (dtype,))
    exact = [values.double() for values in blocks_of(plan, params)]
    slack = torch.zeros(len(plan.blocks), dtype=torch.float64)
    for seed, gammas, weight in updates:
        for i, (gamma, block) in enumerate(zip(plan.split(gammas), plan.blocks, strict=True)):
            added = (
                0.2 * weight * ferret_ext.reconstruct(gamma.double(), seed, block.numel, offset=block.offset)
            )
            exact[i] = exact[i] + added.double()
            slack[i] += 1e-6 * added.norm()
    ferret_ext.apply_(plan, params, updates, 0.2)
    for got, wanted, off in zip(blocks_of(plan, params), exact, slack, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * torch.linalg.vector_norm(wanted) * 1.001
        assert torch.linalg.vector_norm(got.double() - wanted) <= rounding + off


def test_apply_of_opposite_updates_changes_nothing(plan: BlockPlan) -> None:
    """Updates are summed before they touch the parameter: what cancels leaves no rounding behind."""
    params, gammas = parameters(500, (torch.bfloat16,)), normal(plan.K, 2)
    ferret_ext.apply_(plan, params, [(1, gammas, 0.5), (1, gammas, -0.5)], 1e4)
    for got, before in zip(params, parameters(500, (torch.bfloat16,)), strict=True):
        assert_same_bits(got, before)


def test_apply_without_updates_changes_nothing(plan: BlockPlan) -> None:
    params = parameters(500)
    ferret_ext.apply_(plan, params, [], 1.0)
    assert_same_bits(torch.cat(params), torch.cat(parameters(500)))


def test_apply_mixes_dtypes(plan: BlockPlan) -> None:
    """Each parameter of a mixed model gets what it gets in a model of its own dtype, if none is float64."""
    mixed = (torch.float32, torch.bfloat16, torch.float16)
    params, updates = parameters(600, mixed), [(1, normal(plan.K, 3), 0.5), (2, normal(plan.K, 4), 0.5)]
    ferret_ext.apply_(plan, params, updates, -0.1)
    for dtype in mixed:
        alike = [param.to(dtype) for param in parameters(600, mixed)]
        ferret_ext.apply_(plan, alike, updates, -0.1)
        for got, wanted in zip(params, alike, strict=True):
            if got.dtype == dtype:
                assert_same_bits(got, wanted)


def test_project_difference_mixes_dtypes(plan: BlockPlan) -> None:
    """A client on bfloat16 and one on float32 parameters of equal values send the same coordinates."""
    old, new = parameters(700, (torch.bfloat16,)), parameters(800, (torch.bfloat16,))
    wide_old, wide_new = [tensor.float() for tensor in old], [tensor.float() for tensor in new]
    expected = ferret_ext.project_difference(plan, wide_old, wide_new, SEED)
    assert expected.dtype == torch.float32
    assert_same_bits(ferret_ext.project_difference(plan, old, new, SEED), expected)
    assert_same_bits(ferret_ext.project_difference(plan, old, wide_new, SEED), expected)


def test_one_float64_tensor_makes_the_working_precision_float64(plan: BlockPlan) -> None:
    old, new = parameters(700), parameters(800)
    old[2] = old[2].double()
    gammas = ferret_ext.project_difference(plan, old, new, SEED)
    assert gammas.dtype == torch.float64
    widened = ([tensor.double() for tensor in tensors] for tensors in (old, new))
    assert_same_bits(gammas, ferret_ext.project_difference(plan, *widened, SEED))


def test_plan_operators_take_strided_parameters(plan: BlockPlan) -> None:
    def strided(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack([tensor, tensor], 1)[:, 0] for tensor in tensors]

    old, new, gammas = parameters(700), parameters(800), normal(plan.K)
    got = ferret_ext.project_difference(plan, strided(old), strided(new), SEED)
    assert_same_bits(got, ferret_ext.project_difference(plan, old, new, SEED))
    params = strided(old)
    ferret_ext.apply_(plan, params, [(SEED, gammas, 1.0)], 0.5)
    ferret_ext.apply_(plan, old, [(SEED, gammas, 1.0)], 0.5)
    assert_same_bits(torch.cat(params), torch.cat(old))


def test_plan_operators_do_not_depend_on_threads(plan: BlockPlan, restored_threads: None) -> None:
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        params, gammas = (
            parameters(900),
            ferret_ext.project_difference(plan, parameters(700), parameters(800), SEED),
        )
        ferret_ext.apply_(plan, params, [(1, gammas, 0.5), (2, gammas, 0.25)], 0.5)
        results.append((gammas, torch.cat(params)))
    for gammas, params in results[1:]:
        assert_same_bits(gammas, results[0][0])
        assert_same_bits(params, results[0][1])
