"""Arrows run one way: what each part of the sources may include and import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "ferret_ext"
FEDERATED = PACKAGE / "federated"

# A folder of csrc -> the folders it may include, and what its system headers must look like.
STANDARD = r"\w+"  # <vector>; no C++ standard header has a dot or a slash in its name
NATIVE_ARROWS = {
    "core": ({"core"}, STANDARD),
    "cpu": ({"core", "cpu"}, rf"{STANDARD}|immintrin\.h|arm_neon\.h"),
    "cuda": ({"core", "cuda"}, rf"{STANDARD}|cuda\w*\.h|nvtx3/.*"),
    "bindings": ({"core", "cpu", "cuda", "bindings"}, r".*"),
}

NATIVE_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cuh", ".cu"})
MODULES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", NATIVE_FILES, ids=relative)
def test_native_sources_include_only_what_lies_below(path: Path) -> None:
    folders, system = NATIVE_ARROWS[path.relative_to(CSRC).parts[0]]
    for quote, name in includes(path):
        if quote == "<":
            assert re.fullmatch(system, name), f"{relative(path)} includes <{name}>"
        else:
            target = next(p.resolve() for p in (path.parent / name, CSRC / name) if p.exists())
            assert target.relative_to(CSRC).parts[0] in folders, f"{relative(path)} includes {name}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """`from ..x import y` in a module of the package, as `ferret_ext.x`."""
    if node.level == 0:
        return node.module or ""
    package = module_name(path).split(".") + (["__init__"] if path.name == "__init__.py" else [])
    return ".".join([*package[: -node.level], *([node.module] if node.module else [])])


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Full names of what a module imports: `a.b` and, for `from a import b`, `a.b` too."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{absolute(node, path)}.{alias.name}" for alias in node.names)


def imports_any(path: Path, *targets: str) -> list[str]:
    return [name for name in imports(path) for target in targets if f"{name}.".startswith(f"{target}.")]


@pytest.mark.parametrize("path", [p for p in MODULES if FEDERATED not in p.parents], ids=relative)
def test_tensor_layer_does_not_know_the_federated_layer(path: Path) -> None:
    assert not imports_any(path, "ferret_ext.federated")
    known = {"torch", "numpy", "ferret_ext", *sys.stdlib_module_names}
    for name in imports(path):
        assert name.split(".")[0] in known, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "ops.py"], ids=relative)
def test_only_ops_names_the_native_operators(path: Path) -> None:
    assert "ops.ferret" not in path.read_text()


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "fsdp.py"], ids=relative)
def test_only_fsdp_knows_distributed_tensors(path: Path) -> None:
    assert not imports_any(path, "torch.distributed.tensor")


def test_plan_does_not_know_the_operators() -> None:
    assert not imports_any(PACKAGE / "plan.py", "ferret_ext.ops", "ferret_ext._native")


def test_reference_imports_nothing_native() -> None:
    for path in PACKAGE.glob("*reference*.py"):
        assert not imports_any(path, "ferret_ext.ops", "ferret_ext._native"), relative(path)


def test_algorithms_import_no_other_algorithm() -> None:
    shared = {"__init__", "base", "plans", "server_optimizer", "updates"}
    files = [p for p in FEDERATED.glob("algorithms/*.py") if p.stem not in shared]
    for path in files:
        others = [module_name(other) for other in files if other != path]
        assert not imports_any(path, *others), f"{relative(path)} imports another algorithm"


def test_algorithms_do_not_know_how_updates_are_masked() -> None:
    """But for the one place that makes them, and the name of a type."""
    for path in [p for p in FEDERATED.glob("algorithms/*.py") if p.stem not in ("__init__", "base")]:
        assert not imports_any(path, "ferret_ext.federated.secure"), relative(path)


def test_wire_knows_bytes_not_models() -> None:
    models = ["transformers", "datasets", "torch.nn", "ferret_ext.federated"]
    assert not imports_any(FEDERATED / "wire.py", *models)


def test_rounds_do_not_know_the_engines() -> None:
    assert not imports_any(FEDERATED / "rounds.py", "ferret_ext.federated.engines")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    extras = {"flwr", "peft", "wandb", "mlflow", "tensorboard", "matplotlib", "rouge", "rouge_score"}
    extras |= {"cryptography", "Crypto", "dp_accounting"}
    found = extras & {name.split(".")[0] for name in imports(path, at_import_time=True)}
    assert not found, f"{relative(path)} imports {found} when it is itself imported"
