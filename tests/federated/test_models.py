"""Built-in and pretrained models with their tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ferret_ext.federated import models
from ferret_ext.federated.settings import ConfigError

CPU = torch.device("cpu")


def test_tiny_llama_follows_from_its_seed() -> None:
    first, second, other = (models.tiny_llama(seed) for seed in (1, 1, 2))
    state = torch.random.get_rng_state()
    models.tiny_llama(3)
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("text", ["", "plain text", "a  b\n\tc ", "éß 漢字 🦡", "x" * 600])
def test_byte_tokenizer_gives_text_back(text: str) -> None:
    tokenizer = models.byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float16", torch.float16)])
def test_load_takes_a_folder_in_the_dtype_asked_for(
    tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    models.tiny_llama(1).bfloat16().save_pretrained(tmp_path)
    models.byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path), dtype, CPU, 0)
    assert model.dtype == expected
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert models.trainable_bytes(model) == 2 * 107_520


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: expected a folder or a hub name, got '/absent/model'"):
        models.load("/absent/model", "float32", CPU, 0)
    with pytest.raises(ConfigError, match="model: expected a causal language model with its tokenizer"):
        models.load(str(tmp_path), "float32", CPU, 0)
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(ConfigError, match=f"which is a file; give its folder, '{tmp_path}'"):
        models.load(str(weights), "float32", CPU, 0)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("size", [0, 7, 1000])
def test_load_refuses_damaged_weights(tmp_path: Path, name: str, size: int) -> None:
    model = models.tiny_llama(1)
    model.save_pretrained(tmp_path)
    models.byte_tokenizer().save_pretrained(tmp_path)
    if name.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(ConfigError, match="model: expected a causal language model") as caught:
        models.load(str(tmp_path), "float32", CPU, 0, allow_pickle=True)
    assert "\n" not in str(caught.value)


def test_load_names_the_builtin_model_and_absent_folders(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="model: expected builtin:tiny-llama, got 'builtin:foo'"):
        models.load("builtin:foo", "float32", CPU, 0)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match="at 'bad/nope', which is no folder here: no connection"):
        models.load("bad/nope", "float32", CPU, 0)
    assert caplog.messages == ["model: 'bad/nope' is no folder here; asking the Hugging Face hub for it"]


def test_load_refuses_a_tokenizer_that_is_too_large_or_knows_no_end(tmp_path: Path) -> None:
    tokenizer = models.byte_tokenizer()
    models.tiny_llama(1).save_pretrained(tmp_path)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a tokenizer of at most 259 tokens, got 260"):
        models.load(str(tmp_path), "float32", CPU, 0)
    tokenizer = models.byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a tokenizer with an EOS token, got none"):
        models.load(str(tmp_path), "float32", CPU, 0)


def test_saved_tiny_llama_is_a_transformers_folder(tmp_path: Path) -> None:
    model, tokenizer = models.load(models.TINY_LLAMA, "float32", CPU, 4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = AutoTokenizer.from_pretrained(tmp_path)("2 + 3", return_tensors="pt")
    assert inputs["input_ids"].tolist() == tokenizer("2 + 3", return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_pick_device_says_what_it_expects() -> None:
    assert models.pick_device("cpu") == CPU
    assert models.pick_device("auto").type in {"cpu", "cuda"}
    for name in ("tpv", "", "meta", "mps", "cpu:3", "cuda:", "cuda:-1", "cuda:٣", "cuda:01", "cuda:999"):
        with pytest.raises(ConfigError, match=f"device: expected auto, cpu, cuda or cuda:N, got '{name}'"):
            models.pick_device(name)


def test_pick_device_says_how_many_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="device: expected one of 2 visible GPUs, got 'cuda:2'"):
        models.pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="expected auto or cpu, as this torch sees no GPU, got 'cuda'"):
        models.pick_device("cuda")


def test_the_gpu_that_is_picked_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert models.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda:1")]
