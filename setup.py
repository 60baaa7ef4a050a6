"""Builds the native libraries: checks what a build needs, then calls CMakeLists.txt, the list of sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MINIMUM_TORCH = "2.11"


def stop(reason: str) -> NoReturn:
    sys.exit(f"ferret-ext cannot be built: {reason}")


def find_torch() -> Path | None:
    """The folder of the torch to build against, also one that pip's build isolation hides from `import`."""
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec("torch", [*sys.path, *installed])
    return Path(spec.origin).parent if spec and spec.origin else None


def check_torch(torch: Path | None) -> tuple[Path, str]:
    """Its folder and version, when it is new enough."""
    if torch is None:
        stop(f"torch is missing; install it: pip install 'torch>={MINIMUM_TORCH}'")
    match = re.search(r"__version__ = '((\d+)\.(\d+).*)'", (torch / "version.py").read_text())
    if not match or (int(match[2]), int(match[3])) < tuple(map(int, MINIMUM_TORCH.split("."))):
        found = match[1] if match else "of an unknown version"
        stop(f"torch {found} is too old; install a newer one: pip install 'torch>={MINIMUM_TORCH}'")
    return torch, match[1]


def check_tools() -> None:
    if not any(map(shutil.which, [os.environ.get("CXX", "c++").split()[0], "g++", "clang++"])):
        stop("a C++ compiler is missing; install one: apt-get install g++, or name yours in CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop("Python.h is missing; install the headers of this Python: apt-get install python3-dev")
    if not shutil.which("cmake") or not find_spec("pybind11"):
        stop("a build tool is missing; install them: pip install cmake ninja pybind11")


class CMakeBuild(build_ext):
    """`_native` stands for all that CMake installs into the package folder."""

    def run(self) -> None:
        # The tools of an environment that is not activated.
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        torch, version = check_torch(find_torch())
        check_tools()
        in_place = self.inplace or self.editable_mode
        package = (Path() if in_place else Path(self.build_lib)).resolve() / "ferret_ext"
        build = f"build/{sys.implementation.cache_tag}-torch-{version}"
        options = [
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFERRET_TORCH_DIR={torch}",
            f"-DFERRET_CUDA={os.environ.get('FERRET_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        if ninja := shutil.which("ninja"):
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self.cmake("-S", ".", "-B", build, *options)
        self.cmake("--build", build, "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count())))
        shutil.rmtree(package / "lib", ignore_errors=True)  # no CUDA library of an earlier build
        self.cmake("--install", build)

    def cmake(self, *arguments: str) -> None:
        if subprocess.run(["cmake", *arguments]).returncode != 0:
            stop("the reason is in CMake's lines above")

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable build has nothing left to copy


if sys.version_info < (3, 10):
    stop("Python {}.{} is too old; install Python 3.10 or later".format(*sys.version_info))
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old; install a newer one: pip install 'setuptools>=77'")
setup(
    ext_modules=[Extension("ferret_ext._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if find_torch() else [f"torch>={MINIMUM_TORCH}"],
)
