"""Models from outside: no pickles unless allowed, no code of theirs, and no ways out of their folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ferret_ext.federated import adapters, models
from ferret_ext.federated.config import AdapterConfig
from ferret_ext.federated.data import natural_instructions
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.settings import ConfigError

CPU = torch.device("cpu")


def saved(folder: Path, **how: Any) -> Path:
    models.tiny_llama(1).save_pretrained(folder, **how)
    models.byte_tokenizer().save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, **changed: Any) -> Path:
    """A folder with a prompt for the model in `base`."""
    model, tokenizer = models.load(str(base), "float32", CPU, 0)
    adapters.save(adapters.attach(model, AdapterConfig("prompt-tuning"), 0), tokenizer, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


def load(folder: Path, **how: Any) -> Any:
    return models.load(str(folder), "float32", CPU, 0, **how)[0]


def with_pickle(folder: Path) -> Path:
    state = load(saved(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_pickles_are_opened_only_where_allowed(tmp_path: Path) -> None:
    folder = with_pickle(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"got pytorch_model\.bin: .*; convert them .* or set allow_pickle"):
        load(folder)
    allowed, same = load(folder, allow_pickle=True), load(saved(tmp_path / "same"))
    assert torch.equal(*(next(model.parameters()) for model in (allowed, same)))


def test_what_the_error_says_of_converting_works(tmp_path: Path) -> None:
    folder, other = with_pickle(tmp_path / "model"), tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    pairs = zip(load(other).parameters(), load(saved(tmp_path / "same")).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_pickle_beside_safetensors_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_hub_model_is_asked_for_safetensors_and_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def pretend(*_: Any, **how: Any) -> Any:
        asked.append(how)
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pretend)
    with pytest.raises(ConfigError, match=r"no file named model\.safetensors; .* or set allow_pickle=true"):
        models.load("some/model", "float32", CPU, 0)
    with pytest.raises(ConfigError):
        models.load("some/model", "float32", CPU, 0, allow_pickle=True)
    assert [(how["use_safetensors"], how["trust_remote_code"]) for how in asked] == [
        (True, False),
        (None, False),
    ]


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "model")
    (folder / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    path = folder / "config.json"
    said = json.loads(path.read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps({**said, "auto_map": names, "model_type": "evil"}))
    with pytest.raises(ConfigError, match="comes with code of its own, which is never run"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../outside/model.safetensors",
        "/etc/passwd",
        "a/../../b",
        "..",
        "C:\\b.safetensors",
        "..\\b",
        "",
        3,
        None,
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: Any) -> None:
    folder = saved(tmp_path / "model", max_shard_size="100KB")
    saved(tmp_path / "outside")
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    load(folder)
    said["weight_map"][next(iter(said["weight_map"]))] = name
    index.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"expected .*index\.json to name files of its folder, got"):
        load(folder)


@pytest.mark.parametrize("text", ["[" * 10**5, "{", "[]", '{"weight_map": []}', "\udcff"])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        load(folder)


def test_an_adapter_is_opened_on_the_base_that_it_names(tmp_path: Path) -> None:
    folder = adapter_of(saved(tmp_path / "base"), tmp_path / "adapter")
    assert hasattr(load(folder), "peft_config")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base_model_name_or_path": "../base"}, "to be a hub name, or a folder without '..', got '../base'"),
        ({"base_model_name_or_path": "x/../../base"}, "a folder without '..'"),
        ({"base_model_name_or_path": ""}, "a folder without '..', got ''"),
        ({"base_model_name_or_path": None}, "a folder without '..', got None"),
        ({"task_type": None, "auto_mapping": {"parent_library": "os"}}, 'expected task_type "CAUSAL_LM"'),
        ({"megatron_config": {}, "megatron_core": "os"}, "expected megatron_config null"),
    ],
)
def test_an_adapter_leads_nowhere_else(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folder = adapter_of(saved(tmp_path / "base"), tmp_path / "adapter", **changed)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_an_adapters_base_is_looked_at_like_a_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    second = adapter_of(base, tmp_path / "second", base_model_name_or_path=str(adapter))
    with pytest.raises(ConfigError, match="to name a model, got an adapter"):
        load(second)
    with_pickle(base)
    with pytest.raises(ConfigError, match=r"in .*base, got pytorch_model\.bin"):
        load(adapter)
    load(adapter, allow_pickle=True)


def test_an_adapters_pickle_is_refused_too(tmp_path: Path) -> None:
    folder = adapter_of(saved(tmp_path / "base"), tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"got adapter_model\.bin"):
        load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "a\\b"])
def test_lists_of_tasks_hold_names_and_no_paths(tmp_path: Path, name: str) -> None:
    path = tmp_path / "train_tasks.txt"
    path.write_text(f"fine\n{name}\n")
    with pytest.raises(DataError, match="line 2: expected a task's name, found a path"):
        natural_instructions._read_list(path)
