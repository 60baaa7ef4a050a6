"""What `make package` leaves in dist/: what a build needs, what a user needs, and nothing else."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import ferret_ext

ROOT = Path(__file__).parents[1]
VERSION = ferret_ext.__version__
BUILD = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "CMakeLists.txt",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
)
LIBRARIES = {"libferret_ops.so", "libferret_ops_cuda.so"}


def made(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern))
    if not found:
        pytest.skip("nothing is in dist/: make package")
    assert len(found) == 1
    return found[0]


def tracked(*folders: str) -> set[str]:
    """The files that git knows in these folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *folders]
    return set(filter(None, subprocess.run(command, capture_output=True, text=True).stdout.split("\0")))


def test_the_source_distribution_holds_what_a_build_needs() -> None:
    with tarfile.open(made("*.tar.gz")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    own = {name for name in names if not name.startswith("ferret_ext.egg-info/")} - {"PKG-INFO", "setup.cfg"}
    assert own == tracked("csrc", "ferret_ext", "ferret_link", *BUILD)


def test_the_wheel_holds_the_package() -> None:
    with zipfile.ZipFile(made("*.whl")) as archive:
        names = set(archive.namelist())
        about = archive.read(f"ferret_ext-{VERSION}.dist-info/METADATA").decode()
        scripts = archive.read(f"ferret_ext-{VERSION}.dist-info/entry_points.txt").decode()
    own = {name for name in names if not name.startswith(f"ferret_ext-{VERSION}.dist-info/")}
    binaries = {name for name in own if name.endswith(".so")}
    assert own - binaries == tracked("ferret_ext", "ferret_link")
    assert "ferret_ext/py.typed" in own
    assert {Path(name).name for name in binaries} - LIBRARIES == {
        Path(name).name for name in binaries if name.startswith("ferret_ext/_native.")
    }
    assert f"\nVersion: {VERSION}\n" in about
    assert "ferret = ferret_link.command:main" in scripts
