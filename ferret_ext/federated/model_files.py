"""A model's folder, looked at before it is opened: no weights that run code, and no ways out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ferret_ext.federated.settings import ConfigError

ADAPTER = "adapter_config.json"
CONVERT = (
    "convert them once, where you trust whoever made them, by "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER), or set allow_pickle=true"
)


def check(folder: Path, allow_pickle: bool) -> None:
    """Raises ConfigError for a folder that transformers or PEFT should not open.

    That is one with weights as pickles alone, unless they are allowed; an index of shards that lie elsewhere;
    an adapter that belongs to another adapter or to a path that leads upwards, or has modules imported.
    """
    _check_weights(folder, allow_pickle)
    for index in sorted(folder.glob("*.index.json")):
        _check_shards(index)
    if (folder / ADAPTER).is_file():
        base = _base_of(folder / ADAPTER)
        if base.is_dir():  # else it is a hub name, or there is none
            if (base / ADAPTER).exists():
                raise ConfigError(
                    f"model: expected {folder / ADAPTER} to name a model, got an adapter, {base}"
                )
            check(base, allow_pickle)


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
    if pickles and not allow_pickle and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model: expected weights in files of safetensors in {folder}, got {min(pickles)}: pickles may "
            f"run code when they are opened; {CONVERT}"
        )


def _check_shards(index: Path) -> None:
    """Whether an index names files of its own folder alone."""
    shards = _json(index).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else [None]
    for name in names:
        if not isinstance(name, str) or not _inside(name):
            raise ConfigError(f"model: expected {index} to name files of its folder, got {name!r:.80}")


def _base_of(adapter: Path) -> Path:
    """What the adapter says that it belongs to: a folder, as this machine would find it, or a hub name."""
    said = _json(adapter)
    base = said.get("base_model_name_or_path")
    fits = isinstance(base, str) and base != "" and ".." not in PurePosixPath(base).parts and "\\" not in base
    if not fits:
        raise ConfigError(
            f"model: expected base_model_name_or_path in {adapter} to be a hub name, or a folder without "
            f"'..', got {base!r:.80}"
        )
    for key, expected in (("task_type", "CAUSAL_LM"), ("megatron_config", None)):  # others import by name
        if said.get(key) != expected:
            raise ConfigError(
                f"model: expected {key} {json.dumps(expected)} in {adapter}, got {said.get(key)!r:.80}"
            )
    return Path(str(base))


def _inside(name: str) -> bool:
    parts = list(_parts(name))
    return bool(parts) and ".." not in parts and not any(kind(name).anchor for kind in _KINDS)


def _parts(name: str) -> Iterator[str]:
    for kind in _KINDS:
        yield from kind(name).parts


_KINDS = (PurePosixPath, PureWindowsPath)


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model: expected readable JSON in {path}, got: {error}") from None
    if not isinstance(said, dict):
        raise ConfigError(f"model: expected an object in {path}, got {type(said).__name__}")
    return said
