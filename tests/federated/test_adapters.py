"""FedIT, FedPrompt and FedPTuning against modules of a few lines, and what becomes of their models."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import deliver
from torch import Tensor, nn
from toy import examples, tiny_model

from ferret_ext.federated import adapters, algorithms, models, wire
from ferret_ext.federated.algorithms.base import LocalData
from ferret_ext.federated.client import LocalTrainer, steps
from ferret_ext.federated.config import AdapterConfig, SimulationConfig, TrainingConfig
from ferret_ext.federated.data.tokens import IGNORED, collate
from ferret_ext.federated.metrics import evaluation_loss
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError

peft = pytest.importorskip("peft", reason="adapters need PEFT")

TRAINING = TrainingConfig(max_steps=3, gradient_accumulation_steps=2, learning_rate=0.02)
TOKENS = 4
RANK, ALPHA = 3, 6


class Lora(nn.Module):
    """y = W x + alpha / r * B A x."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.linear(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)
        return added


class Prompted(nn.Module):
    """Virtual tokens' embeddings in front of the text's, through an MLP for p-tuning; no loss on them."""

    def __init__(self, model: Any, encoder: nn.Module, prompt: Tensor) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder
        self.prompt = nn.Parameter(prompt.detach().clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        rows = len(input_ids)
        front = self.encoder(self.prompt).expand(rows, -1, -1)
        embeddings = torch.cat([front, self.model.get_input_embeddings()(input_ids)], dim=1)
        ones, ignored = torch.ones(rows, TOKENS), torch.full((rows, TOKENS), IGNORED)
        return self.model(
            inputs_embeds=embeddings,
            attention_mask=torch.cat([ones.long(), attention_mask], dim=1),
            labels=torch.cat([ignored, labels], dim=1),
        )


def config_of(algorithm: str, **adapter: Any) -> SimulationConfig:
    sizes = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "num_virtual_tokens": TOKENS}
    settings = AdapterConfig(**{**sizes, "encoder_hidden_size": 5, **adapter})
    return adapters.resolve(SimulationConfig(algorithm=algorithm, training=TRAINING, adapter=settings))  # type: ignore[arg-type]


def by_hand(algorithm: str, start: Any) -> nn.Module:
    """The same adapter with the same first weights as PEFT's, on a model of its own."""
    model = tiny_model()
    for param in model.parameters():
        param.requires_grad_(False)
    state = dict(start.named_parameters())
    if algorithm.startswith("fedit"):
        layer = model.model.layers[0]
        for part, name in [("self_attn", n) for n in "qkvo"] + [("mlp", n) for n in ("gate", "up", "down")]:
            block, path = getattr(layer, part), f"{name}_proj"
            prefix = f"base_model.model.model.layers.0.{part}.{path}"
            a, b = (state[f"{prefix}.lora_{side}.default.weight"] for side in "AB")
            setattr(block, path, Lora(getattr(block, path), a, b))
        return model  # type: ignore[no-any-return]
    prompt = state["prompt_encoder.default.embedding.weight"]
    mlp = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 16))
    if algorithm == "fedptuning":
        with torch.no_grad():
            for i, name in enumerate(["0", "2", "4"]):
                mlp[2 * i].weight.copy_(state[f"prompt_encoder.default.mlp_head.{name}.weight"])
                mlp[2 * i].bias.copy_(state[f"prompt_encoder.default.mlp_head.{name}.bias"])
    return Prompted(model, mlp if algorithm == "fedptuning" else nn.Identity(), prompt)


def train_by_hand(model: nn.Module, data: Any, seed: int, optim: str) -> list[Tensor]:
    """The trained parameters, in order."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = (torch.optim.Adam if optim == "adam" else torch.optim.SGD)(params, lr=0.02)
    for batches in steps(len(data), TRAINING, seed):
        optimizer.zero_grad()
        for batch in batches:
            loss = model(**collate([data[i] for i in batch], 0, torch.device("cpu"))).loss
            (loss / len(batches)).backward()
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize(
    ("algorithm", "optim"),
    [("fedit", "adam"), ("fedit-sgd", "sgd"), ("fedprompt", "adam"), ("fedptuning", "adam")],
)
def test_round_is_the_weighted_mean_of_adapters_trained_by_hand(algorithm: str, optim: str) -> None:
    """Two clients with 9 and 3 examples; afterwards the global model's logits are those by hand."""
    config = config_of(algorithm)
    start = adapters.attach(tiny_model(), config.adapter, seed=3)
    run = algorithms.create(config, LocalTrainer(config.training, 0))
    server, client = (
        Server(run, copy.deepcopy(start), [0, 1], 1.0, 0),
        run.replicate(copy.deepcopy(start)),
    )
    shards = [examples(9, seed=1), examples(3, seed=2)]
    messages = [
        run.client_update(
            client, LocalData(i, 1, 50 + i, shard, float(len(shard))), server.broadcasts
        ).payload
        for i, shard in enumerate(shards)
    ]
    assert not deliver(server, messages)

    expected = by_hand(algorithm, start)
    ours = [param for param in expected.parameters() if param.requires_grad]
    sums = [torch.zeros_like(param) for param in ours]
    for i, (shard, share) in enumerate(zip(shards, (0.75, 0.25), strict=True)):
        trained = train_by_hand(copy.deepcopy(expected), shard, derive(50 + i, "training"), optim)
        for total, param in zip(sums, trained, strict=True):
            total += share * param
    assert max((param - mean).abs().max() for param, mean in zip(ours, sums, strict=True)) > 1e-3
    with torch.no_grad():
        for param, mean in zip(ours, sums, strict=True):
            param.copy_(mean)
    batch = collate(shards[0], 0, torch.device("cpu"))
    expected.eval()
    server.replica.model.eval()
    got, wanted = server.replica.model(**batch), expected(**batch)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", list(adapters.PUBLISHED))
def test_only_the_adapter_travels(algorithm: str) -> None:
    config = config_of(algorithm)
    model = adapters.attach(tiny_model(), config.adapter, seed=3)
    run = algorithms.create(config, LocalTrainer(config.training, 0))
    replica = run.replicate(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    reply = run.client_update(replica, LocalData(0, 1, 5, examples()), [run.open(replica)])
    message = wire.decode(reply.payload)
    assert message.algorithm == algorithm
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {"lora": RANK * (4 * 16 + 16 + 8 + 8 + 16 + 3 * 40), "prompt-tuning": TOKENS * 16}
    assert trainable == sizes.get(config.adapter.type, TOKENS * 16 + 5 * 17 + 5 * 6 + 16 * 6)
    assert len(reply.payload) < 4 * trainable + 128 + 24 * len(message.values)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_all_parties_draw_the_same_adapter_from_the_seed() -> None:
    first, second, other = (
        adapters.attach(tiny_model(), config_of("fedptuning").adapter, seed) for seed in (1, 1, 2)
    )
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    adapters.attach(tiny_model(9), config_of("fedit").adapter, 1)
    torch.manual_seed(9)
    assert torch.equal(before, torch.get_rng_state())


def test_published_numbers_are_the_defaults() -> None:
    model = adapters.attach(tiny_model(), adapters.resolve(SimulationConfig(algorithm="fedit")).adapter, 0)
    lora = model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.05)
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {name.rpartition(".")[2] for name in lora.target_modules} == projections
    resolved = adapters.resolve(SimulationConfig(algorithm="fedptuning"))
    assert (resolved.training.optim, resolved.adapter.type) == ("adam", "p-tuning")
    prompt = adapters.attach(tiny_model(), resolved.adapter, 0).peft_config["default"]
    assert (prompt.num_virtual_tokens, prompt.encoder_dropout) == (20, 0.1)
    assert prompt.encoder_reparameterization_type == "MLP"
    assert adapters.resolve(SimulationConfig(algorithm="fedit-sgd")).training.optim == "sgd"
    plain = adapters.resolve(SimulationConfig())
    assert (plain.training.optim, plain.adapter.type) == ("sgd", "none")


def test_an_adapter_that_is_not_the_algorithms_is_refused() -> None:
    wrong = SimulationConfig(algorithm="fedit", adapter=AdapterConfig(type="p-tuning"))
    with pytest.raises(ConfigError, match=r"adapter.type: expected lora, which fedit tunes, got p-tuning"):
        adapters.resolve(wrong)
    other = SimulationConfig(algorithm="ferret", adapter=AdapterConfig(type="lora"))
    assert adapters.resolve(other) == SimulationConfig(
        algorithm="ferret", adapter=other.adapter, training=TrainingConfig(optim="sgd")
    )


def test_missing_peft_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install '\.\[peft\]'"):
        adapters.attach(tiny_model(), AdapterConfig(type="lora"), 0)
    model = tiny_model()
    assert adapters.attach(model, AdapterConfig(type="none"), 0) is model


def test_evaluation_loss_leaves_virtual_tokens_out() -> None:
    """The model's own loss, which PEFT computes over labels that it has put in front."""
    model = adapters.attach(tiny_model(), config_of("fedprompt").adapter, 0).eval()
    data = examples(4)
    alone = [model(**collate([example], 0, torch.device("cpu"))).loss.item() for example in data]
    assert evaluation_loss(model, data, 4, 0) == pytest.approx(sum(alone) / 4, rel=1e-6)


@pytest.mark.parametrize("algorithm", ["fedit", "fedprompt"])
@pytest.mark.parametrize("named", [True, False])
def test_saved_folder_gives_the_same_logits(tmp_path: Path, algorithm: str, named: bool) -> None:
    """LoRA merged into a plain model; a prompt as an adapter that PEFT opens, its base named or not."""
    base = models.tiny_llama(1)
    tokenizer = models.byte_tokenizer()
    if named:
        base.save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        base, _ = models.load(str(tmp_path / "source"), "float32", torch.device("cpu"), 0)
    config = config_of(algorithm, num_virtual_tokens=20)
    model = adapters.attach(base, config.adapter, 0)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1)
    ids = tokenizer("2 + 3", return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    adapters.save(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "base").exists() == (algorithm == "fedprompt" and not named)
    from transformers import AutoModelForCausalLM

    opener = AutoModelForCausalLM if algorithm == "fedit" else peft.AutoPeftModelForCausalLM
    again = opener.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
