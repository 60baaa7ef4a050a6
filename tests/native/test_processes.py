"""Forked processes and many threads: the operators work in all of them, and to the same bits."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import BASES, assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan

NUMEL, K = 100_000, 40_000  # many tasks, and coordinates enough for torch's own loops to use threads
TIMEOUT = 300  # seconds, on a busy machine


def small_plan() -> BlockPlan:
    named = [("a", torch.nn.Parameter(torch.zeros(5000))), ("b", torch.nn.Parameter(torch.zeros(700)))]
    return BlockPlan.from_parameters(named, 70)


def everything(seed: int, basis: str = "rademacher") -> list[Tensor]:
    """One result of every operator."""
    plan, old, new = small_plan(), [normal(5000, 1), normal(700, 2)], [normal(5000, 3), normal(700, 4)]
    gammas = ferret_ext.project_difference(plan, old, new, seed, basis=basis)
    ferret_ext.apply_(plan, new, [(seed, gammas, 0.5), (seed + 1, gammas, -0.25)], 0.3, basis=basis)
    delta = normal(30_000, 5, torch.bfloat16)
    gamma = ferret_ext.project(delta, seed, 70, basis=basis)
    return [
        gammas,
        *new,
        gamma,
        ferret_ext.reconstruct(gamma, seed, 30_000, basis=basis),
        ferret_ext.reconstruct_(delta, gamma, seed, alpha=0.5, basis=basis),
        ferret_ext.basis(seed, 3, 30_000, basis=basis),
    ]


def assert_all_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def exit_status_of_fork(check: Callable[[], None]) -> int:
    """Runs check() in a forked child; 0 is success, and a hang ends by a signal."""
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT)
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def two_threads(restored_threads: None) -> None:
    torch.set_num_threads(2)


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of threads beside a fork


def test_operators_work_in_a_process_forked_after_they_used_threads(two_threads: None) -> None:
    delta = normal(NUMEL)
    few, many = ferret_ext.project(delta, 1, 64), ferret_ext.project(delta[:2000], 1, K)
    expected = everything(1)

    def check() -> None:
        assert_same_bits(ferret_ext.project(delta, 1, 64), few)
        assert_same_bits(ferret_ext.project(delta[:2000], 1, K), many)
        assert_all_same_bits(everything(1), expected)
        assert exit_status_of_fork(lambda: assert_all_same_bits(everything(1), expected)) == 0

    assert exit_status_of_fork(check) == 0
    assert torch.get_num_threads() == 2  # the parent keeps its threads
    assert_same_bits(ferret_ext.project(delta, 1, 64), few)


def test_operators_work_in_a_process_forked_while_other_threads_use_them(two_threads: None) -> None:
    expected = everything(1)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(everything, seed) for seed in range(60)]
        for _ in range(5):
            assert exit_status_of_fork(lambda: assert_all_same_bits(everything(1), expected)) == 0
        for other in others:
            other.result()


def first_coordinates(seed: int) -> list[float]:
    return [float(x) for x in ferret_ext.project(normal(NUMEL), seed, 64)[:5]]


def test_operators_work_in_a_pool_of_forked_workers(two_threads: None) -> None:
    expected = [first_coordinates(seed) for seed in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(first_coordinates, range(4)).get(TIMEOUT) == expected


def test_a_thread_that_never_called_for_others_forks_with_all_of_them(two_threads: None) -> None:
    expected = everything(1)

    def check() -> None:
        assert torch.get_num_threads() == 2
        assert_all_same_bits(everything(1), expected)

    with ThreadPoolExecutor(1) as newcomer:
        assert newcomer.submit(exit_status_of_fork, check).result() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_every_operator_from_many_threads_at_once_gives_the_same_bits(
    threads: int, restored_threads: None
) -> None:
    """Callers' own threads share the processor's threads, and nothing else."""
    torch.set_num_threads(threads)
    calls = [(seed, BASES[seed % 3]) for seed in range(24)]
    expected = [everything(*call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for got, alone in zip(pool.map(lambda call: everything(*call), calls), expected, strict=True):
            assert_all_same_bits(got, alone)
