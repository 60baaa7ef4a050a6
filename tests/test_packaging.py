"""What an installed package must hold, and what a failing build says."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch

import ferret_ext
import ferret_link

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ferret_ext.__file__).parent
OPERATORS = ["project", "project_blocks", "reconstruct", "apply_blocks_", "basis_"]


def test_version_is_the_same_everywhere() -> None:
    assert ferret_ext.__version__ == version("ferret-ext")
    assert f'version = "{ferret_ext.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_type_information_is_shipped() -> None:
    for package in (ferret_ext, ferret_link):
        assert Path(package.__file__).with_name("py.typed").exists()
    assert (PACKAGE / "_native.pyi").exists()


def test_console_script_resolves() -> None:
    (script,) = entry_points(group="console_scripts", name="ferret")
    assert callable(script.load())


def test_import_is_light(tmp_path: Path) -> None:
    """At most 0.3 s on top of `import torch`, and none of the federated layer's libraries."""
    program = """
import sys, time, torch
start = time.process_time()
import ferret_ext
seconds = time.process_time() - start
print(seconds, *({"transformers", "datasets", "matplotlib", "rich", "yaml"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]  # not from the source tree, which would hide the package
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    seconds, *heavy = run.stdout.split()
    assert not heavy
    assert float(seconds) <= 0.3


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_cpu_kernels(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ferret::{operator}", "CPU")


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_cuda_kernels(operator: str) -> None:
    """Also where there is no driver: the library loads and registers; only a launch needs a GPU."""
    built = (PACKAGE / "lib" / "libferret_ops_cuda.so").exists()
    if not built and os.environ.get("FERRET_CUDA") != "ON":
        pytest.skip("built without CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ferret::{operator}", "CUDA")


def failing_build(**environment: str) -> str:
    """What a build says that must stop before it compiles."""
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    prefix, line = run.stderr.splitlines()[-1].split(": ", 1)
    assert prefix == "ferret-ext cannot be built"
    return line


def test_too_old_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.4.1+cpu'\n")
    assert failing_build(PYTHONPATH=str(tmp_path)) == (
        "torch 2.4.1+cpu is too old; install a newer one: pip install 'torch>=2.11'"
    )


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    assert failing_build(PATH=str(tmp_path), CXX="no-such-compiler") == (
        "a C++ compiler is missing; install one: apt-get install g++, or name yours in CXX"
    )
