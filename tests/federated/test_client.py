"""Local training and evaluation."""

from __future__ import annotations

import dataclasses
import math
import shutil
from itertools import islice
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import examples, tiny_model

from ferret_ext.federated.client import (
    DivergedError,
    LocalFailure,
    LocalTrainer,
    endless_batches,
    steps,
)
from ferret_ext.federated.config import TrainingConfig
from ferret_ext.federated.data.tokens import Example, collate
from ferret_ext.federated.metrics import evaluation_loss
from ferret_ext.federated.settings import ConfigError


def trained(model: Any, **settings: Any) -> tuple[Any, float]:
    config = TrainingConfig(**{"max_steps": 3, "learning_rate": 0.1, **settings})
    return model, LocalTrainer(config, 0).train(model, examples(), seed=5)


def test_train_takes_a_client_with_one_example() -> None:
    """Every batch repeats it: the same step as on copies of it."""
    config = TrainingConfig(max_steps=2, learning_rate=0.1, per_device_train_batch_size=3)
    one, many = tiny_model(), tiny_model()
    first = LocalTrainer(config, 0).train(one, examples()[:1], seed=5)
    again = LocalTrainer(config, 0).train(many, examples()[:1] * 7, seed=5)
    assert first == again
    assert torch.equal(weights(one), weights(many))


def weights(model: Any) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def test_train_takes_the_steps_of_plain_sgd() -> None:
    """The same gradients summed by hand: T = 2 steps of 2 batches of 2."""
    data, order = examples(), endless_batches(12, 2, seed=5)
    by_hand = tiny_model()
    for _ in range(2):
        batches = [collate([data[i] for i in next(order)], 0, torch.device("cpu")) for _ in range(2)]
        loss = sum(by_hand(**batch).loss for batch in batches) / 2
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for param, gradient in zip(by_hand.parameters(), gradients, strict=True):
                param -= 0.1 * gradient
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    got, _ = trained(tiny_model(), **settings)
    torch.testing.assert_close(weights(got), weights(by_hand), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_train_lowers_the_loss_and_repeats_to_the_bit(optim: str) -> None:
    rate = {"sgd": 0.5, "adam": 0.01}[optim]
    before = evaluation_loss(tiny_model(), examples(), 4, 0)
    first, loss = trained(tiny_model(), optim=optim, learning_rate=rate, max_steps=20)
    second, again = trained(tiny_model(), optim=optim, learning_rate=rate, max_steps=20)
    assert evaluation_loss(first, examples(), 4, 0) < before - 0.5
    assert loss == again
    assert torch.equal(weights(first), weights(second))


def test_train_starts_adam_afresh() -> None:
    """A second round depends on the weights alone, not on moments kept from the first."""
    once, _ = trained(tiny_model(), optim="adam")
    twin = tiny_model()
    twin.load_state_dict(once.state_dict())
    trained(once, optim="adam")
    trained(twin, optim="adam")
    assert torch.equal(weights(once), weights(twin))


def test_train_leaves_frozen_parameters_and_gradients_alone() -> None:
    model = tiny_model()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = frozen.clone()
    trained(model)
    assert torch.equal(frozen, before)
    assert all(param.grad is None for param in model.parameters())


def test_train_clips_gradients() -> None:
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 1.0}
    clipped, _ = trained(tiny_model(), max_grad_norm=0.01, **settings)
    step = (weights(clipped) - weights(tiny_model())).norm()
    assert step.item() == pytest.approx(0.01, rel=1e-3)


def test_train_keeps_the_global_random_state() -> None:
    model = tiny_model()
    torch.manual_seed(3)
    trained(model)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_train_reports_divergence() -> None:
    with pytest.raises(DivergedError, match=r"diverged, .*; lower training.learning_rate or server"):
        trained(tiny_model(), learning_rate=1e30)


def weighted_steps(model: Any, data: list[Example], steps_: list[list[list[int]]], update: Any) -> Any:
    """Gradients summed by hand, a step's being the mean over its batches, and `update(params, gradients)`."""
    params = list(model.parameters())
    for batches in steps_:
        loss = sum(
            model(**collate([data[i] for i in batch], 0, torch.device("cpu"))).loss for batch in batches
        ) / len(batches)
        with torch.no_grad():
            update(params, torch.autograd.grad(loss, params))
    return model


def test_train_takes_the_steps_of_sgd_with_momentum() -> None:
    """v = m v + g + decay w, w -= rate v."""
    velocity: list[torch.Tensor] = []

    def update(params: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> None:
        decayed = [g + 0.01 * p for g, p in zip(gradients, params, strict=True)]
        velocity[:] = [0.9 * v + g for v, g in zip(velocity, decayed, strict=True)] if velocity else decayed
        for param, v in zip(params, velocity, strict=True):
            param -= 0.1 * v

    config = TrainingConfig(max_steps=3, momentum=0.9, weight_decay=0.01, learning_rate=0.1)
    by_hand = weighted_steps(tiny_model(), examples(), list(steps(12, config, 5)), update)
    got, _ = trained(tiny_model(), momentum=0.9, weight_decay=0.01)
    torch.testing.assert_close(weights(got), weights(by_hand), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optim", ["adam", "adamw"])
def test_train_takes_the_steps_of_adam(optim: str) -> None:
    """Moments with bias correction; adamw shrinks the weights by rate * decay apart from the gradient."""
    rate, decay, b1, b2, eps = 0.01, 0.1, 0.8, 0.9, 1e-6
    first: dict[int, Any] = {}
    second: dict[int, Any] = {}
    count = [0]

    def update(params: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> None:
        count[0] += 1
        for i, (param, g) in enumerate(zip(params, gradients, strict=True)):
            g = g + decay * param if optim == "adam" else g
            first[i] = b1 * first.get(i, 0) + (1 - b1) * g
            second[i] = b2 * second.get(i, 0) + (1 - b2) * g * g
            if optim == "adamw":
                param *= 1 - rate * decay
            step = first[i] / (1 - b1 ** count[0])
            param -= rate * step / ((second[i] / (1 - b2 ** count[0])).sqrt() + eps)

    settings = {"adam_beta1": b1, "adam_beta2": b2, "adam_epsilon": eps, "weight_decay": decay}
    settings |= {"optim": optim, "learning_rate": rate, "max_steps": 3}
    by_hand = weighted_steps(tiny_model(), examples(), list(steps(12, TrainingConfig(**settings), 5)), update)
    got, _ = trained(tiny_model(), **settings)
    torch.testing.assert_close(weights(got), weights(by_hand), rtol=1e-4, atol=1e-6)


def test_train_keeps_each_clients_state_if_asked() -> None:
    """Two rounds of 2 steps are one of 4: momentum goes on, and other clients do not disturb it."""
    config = TrainingConfig(max_steps=2, momentum=0.9, learning_rate=0.1, keep_state=True)
    trainer, model, data = LocalTrainer(config, 0), tiny_model(), examples(1)
    trainer.train(model, data, seed=1, client=7)
    trainer.train(tiny_model(3), data, seed=2, client=8)
    trainer.train(model, data, seed=3, client=7)
    whole = LocalTrainer(dataclasses.replace(config, max_steps=4), 0)
    at_once = tiny_model()
    whole.train(at_once, data, seed=1)
    assert torch.equal(weights(model), weights(at_once))
    assert sorted(trainer.states) == [7, 8]
    dropped, fresh = LocalTrainer(dataclasses.replace(config, keep_state=False), 0), tiny_model()
    for seed in (1, 3):
        dropped.train(fresh, data, seed, client=7)
    assert not dropped.states
    assert not torch.equal(weights(fresh), weights(at_once))


def test_train_forgets_the_state_of_a_client_that_diverged() -> None:
    config = TrainingConfig(max_steps=1, momentum=0.9, learning_rate=0.1, keep_state=True)
    trainer, broken = LocalTrainer(config, 0), tiny_model()
    trainer.train(tiny_model(), examples(), seed=1, client=7)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError):
        trainer.train(broken, examples(), seed=1, client=7)
    assert not trainer.states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_train_works_in_half_precision(dtype: torch.dtype) -> None:
    """Close to float32's weights, by the format's own precision."""
    half, loss = trained(tiny_model(dtype=dtype), momentum=0.9)
    single, exact = trained(tiny_model(), momentum=0.9)
    assert half.dtype == dtype
    assert loss == pytest.approx(exact, rel=0.02)
    assert (weights(half).float() - weights(single)).norm() < 0.01 * weights(single).norm()


def test_train_refuses_adam_in_float16() -> None:
    with pytest.raises(ConfigError, match=r"training.optim: expected sgd for float16 weights, got adam, "):
        trained(tiny_model(dtype=torch.float16), optim="adam")
    got, _ = trained(tiny_model(dtype=torch.bfloat16), optim="adam", learning_rate=0.01)
    assert weights(got).isfinite().all()


def test_gradient_checkpointing_changes_no_bit() -> None:
    model, loss = trained(tiny_model(), gradient_checkpointing=True)
    plain, same = trained(tiny_model())
    assert model.is_gradient_checkpointing
    assert loss == same
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps() -> None:
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    compiled, _ = trained(tiny_model(), torch_compile=True)
    plain, _ = trained(tiny_model())
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-4, atol=1e-6)


def test_tied_weights_are_trained_as_one() -> None:
    model, _ = trained(tiny_model(), num_train_epochs=1.0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


def test_train_refuses_a_client_without_examples() -> None:
    with pytest.raises(LocalFailure, match="it holds no examples"):
        LocalTrainer(TrainingConfig(), 0).train(tiny_model(), [], seed=1)


@pytest.mark.parametrize("settings", [{"max_steps": 2}, {"num_train_epochs": 1.0}])
def test_train_takes_a_single_example(settings: dict[str, Any]) -> None:
    """By max_steps it fills the batch again and again; an epoch has it once."""
    config = TrainingConfig(per_device_train_batch_size=4, learning_rate=0.1, **settings)
    loss = LocalTrainer(config, 0).train(tiny_model(), examples(1), seed=1)
    assert math.isfinite(loss)
    expected = [[[0, 0, 0, 0]] * 4] * 2 if "max_steps" in settings else [[[0]]]
    assert list(steps(1, config, 1)) == expected


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 3), st.integers(0, 2**64 - 1))
def test_steps_of_epochs_show_every_example_once_a_pass(
    n: int, size: int, group: int, epochs: float, seed: int
) -> None:
    config = TrainingConfig(
        num_train_epochs=epochs, per_device_train_batch_size=size, gradient_accumulation_steps=group
    )
    grouped = list(steps(n, config, seed))
    batches = [batch for step in grouped for batch in step]
    assert len(batches) == math.ceil(epochs * math.ceil(n / size))
    assert {len(step) for step in grouped[:-1]} <= {group}
    shown = [i for batch in batches for i in batch]
    for start in range(0, len(shown) - n + 1, n):
        assert sorted(shown[start : start + n]) == list(range(n))


def test_endless_batches_show_every_example_once_a_pass() -> None:
    drawn = [i for batch in islice(endless_batches(10, 4, seed=1), 5) for i in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert [len(batch) for batch in islice(endless_batches(3, 8, seed=1), 2)] == [8, 8]


def test_evaluation_loss_looks_past_virtual_tokens() -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    data = examples(3)
    alone = [tuned(**collate([example], 0, torch.device("cpu"))).loss.item() for example in data]
    assert evaluation_loss(tuned, data, 2, 0) == pytest.approx(fmean(alone), rel=1e-6)


def test_evaluation_loss_counts_every_example_alike() -> None:
    """The mean of the losses that the model itself gives for each example, of unequal lengths."""
    model = tiny_model()
    data = [*examples(4), Example((1, 5, 6, 2), 2), Example((1, *range(3, 30)), 4)]
    alone = [model(**collate([example], 0, torch.device("cpu"))).loss.item() for example in data]
    for batch_size in (1, 4, 16):
        assert evaluation_loss(model, data, batch_size, 0) == pytest.approx(fmean(alone), rel=1e-6)
