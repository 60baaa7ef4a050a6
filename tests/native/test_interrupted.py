"""In-place operators that memory or the user stops: every parameter is as before, or every one is changed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from support import assert_same_bits, normal
from torch import Tensor

import ferret_ext
from ferret_ext import BlockPlan, ops

# ---- memory

OUT_OF_MEMORY = """
    import resource, sys, torch, ferret_ext
    from ferret_ext import Block, BlockPlan

    K, NUMEL = 800_000, 50
    names = [(name, NUMEL) for name in "abcd"]
    plan = BlockPlan(tuple(names), tuple(Block(n, i * 512, NUMEL, K // 4) for i, (n, _) in enumerate(names)))
    gammas, matrix = torch.randn(K), torch.randn(NUMEL, 4)
    columns = lambda: list(matrix.clone().T)  # not contiguous
    rows = lambda: [torch.ones(NUMEL) * i for i in range(4)]
    # what is to be changed, and how
    calls = {
        "apply_": (rows, lambda p: ferret_ext.apply_(plan, p, [(i, gammas, 0.5) for i in range(4)], 1.0)),
        "apply_ strided": (columns, lambda p: ferret_ext.apply_(plan, p, [(1, gammas, 1.0)], 1.0)),
        "reconstruct_": (rows, lambda p: ferret_ext.reconstruct_(p[0], gammas, 1)),
        "project": (rows, lambda p: ferret_ext.project(p[0], 1, K)),
        "project_difference": (rows, lambda p: ferret_ext.project_difference(plan, p, rows(), 1)),
        "reconstruct": (rows, lambda p: ferret_ext.reconstruct(gammas[:2], 1, 3_000_000)),
        "basis": (rows, lambda p: ferret_ext.basis(1, 1, 3_000_000)),
    }

    def in_use():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

    def run(make, call):
        # What each call came to, with 0, 4, 8.. MiB left, up to the first that got along
        before, after = make(), make()
        call(after)  # with memory enough; the threads exist from here on
        for mebibytes in range(0, 80, 4):
            params = make()
            limit = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (in_use() + (mebibytes << 20), limit[1]))
            try:
                call(params)
                outcome, expected = "done", after
            except (RuntimeError, MemoryError) as error:
                outcome, expected = str(error), before
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limit)
            assert all(torch.equal(a, b) for a, b in zip(params, expected)), (mebibytes, outcome)
            yield outcome
            if outcome == "done":
                return

    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, arguments in calls.items():
            print(f"{name}, {threads}", *run(*arguments), sep="|")
"""
CLEAR = ("can't allocate memory: you tried to allocate", "out of memory")


def test_out_of_memory_is_said_and_changes_no_parameter() -> None:
    """With 0, 4, 8.. MiB left each call fails with a clear error and changes nothing, until one succeeds."""
    program = [sys.executable, "-c", textwrap.dedent(OUT_OF_MEMORY)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    result = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    seen = {name: outcomes for name, *outcomes in (line.split("|") for line in result.stdout.splitlines())}
    assert len(seen) == 14
    for name, (*errors, last) in seen.items():
        assert last == "done", f"{name} never had memory enough: {last}"
        assert errors, f"{name} never ran out of memory"
        for error in errors:
            assert any(text in error for text in CLEAR), f"{name}: {error}"
    for threads in (1, 2):  # the operator's own memory, beside torch's
        assert any("apply: out of memory; the parameters" in error for error in seen[f"apply_, {threads}"])


# ---- the user


def columns(numel: int) -> list[Tensor]:
    """Parameters that are not contiguous, so that they are changed in a copy first."""
    return list(normal(4 * numel, 1).view(-1, 4).T)


def rows(numel: int) -> list[Tensor]:
    return [normal(numel, seed) for seed in range(4)]


def plan_of(params: list[Tensor]) -> BlockPlan:
    named = [(name, torch.nn.Parameter(param)) for name, param in zip("abcd", params, strict=True)]
    return BlockPlan.from_parameters(named, 100)


UPDATES = [(seed, normal(100, seed), 0.5) for seed in range(2)]


def assert_all_or_none(got: list[Tensor], before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether all have changed."""
    changed = not torch.equal(got[0], before[0])
    for tensor, expected in zip(got, after if changed else before, strict=True):
        assert_same_bits(tensor, expected)
    return changed


def is_interrupted(moment: int, call: Callable[[], None]) -> bool:
    """Raises KeyboardInterrupt at that many instructions of ops.py, if there are so many."""
    left = moment

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != ops.__file__:
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left < 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("make", [rows, columns])
def test_interrupt_between_any_two_instructions_leaves_all_parameters_or_none(
    make: Callable[[int], list[Tensor]],
) -> None:
    before, after = make(50), make(50)
    plan = plan_of(before)
    ferret_ext.apply_(plan, after, UPDATES, 1.0)
    outcomes, moment, interrupted = [], 0, True
    while interrupted:
        params = make(50)
        interrupted = is_interrupted(moment, partial(ferret_ext.apply_, plan, params, UPDATES, 1.0))
        outcomes.append(assert_all_or_none(params, before, after))
        moment += 1
    assert moment > 100
    assert outcomes == sorted(outcomes)  # none up to some moment, all from there on
    assert set(outcomes[:-1]) == {False, True}


def test_interrupt_by_a_signal_leaves_all_parameters_or_none() -> None:
    """Native code runs to its end; the signal is Python's again afterwards."""
    before, after = rows(100_000), rows(100_000)
    plan = plan_of(before)
    start = time.perf_counter()
    ferret_ext.apply_(plan, after, UPDATES, 1.0)
    duration = time.perf_counter() - start
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt
    interrupts = 0
    try:
        for moment in range(1, 40):
            params = [param.clone() for param in before]
            try:
                signal.setitimer(signal.ITIMER_REAL, moment / 40 * duration)
                ferret_ext.apply_(plan, params, UPDATES, 1.0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            assert_all_or_none(params, before, after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupts > 0
