"""FERRET_CPU_ISA chooses the path of a process; Philox alone makes the same words on every path."""

import os
import subprocess
import sys
from functools import reduce
from operator import xor

import pytest

import ferret_ext
from ferret_ext import _native

AVAILABLE = ferret_ext.cpu_capability()["available"]
REPORT = """
import ferret_ext, torch
from ferret_ext import _native
ferret_ext.project(torch.ones(10), 1, 2)
print(ferret_ext.cpu_capability()["isa"], _native.philox_checksum(7, 37, 67))
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FERRET_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_environment_chooses_the_path_and_words_are_the_same(isa: str) -> None:
    words = (word for t in range(67) for k in range(37) for word in _native.words(7, 1, t, k))
    assert run(isa).stdout.split() == [isa, str(reduce(xor, words))]


def test_empty_environment_variable_means_the_best_path() -> None:
    assert run("").stdout.split()[0] == AVAILABLE[-1]


@pytest.mark.parametrize("isa", ["mmx", "AVX2", "neon" if "neon" not in AVAILABLE else "avx2"])
def test_environment_names_a_path_that_is_not_there(isa: str) -> None:
    result = run(isa)
    assert result.returncode != 0
    assert f"FERRET_CPU_ISA: expected one of {', '.join(AVAILABLE)}" in result.stderr
    assert f"got '{isa}'" in result.stderr
