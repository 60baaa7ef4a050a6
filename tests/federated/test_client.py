"""Local training and evaluation."""

from __future__ import annotations

from itertools import islice
from statistics import fmean
from typing import Any

import pytest
import torch
from toy import examples, tiny_model

from ferret_ext.federated.client import DivergedError, LocalTrainer, endless_batches
from ferret_ext.federated.config import TrainingConfig
from ferret_ext.federated.data.tokens import Example, collate
from ferret_ext.federated.metrics import evaluation_loss


def trained(model: Any, **settings: Any) -> tuple[Any, float]:
    config = TrainingConfig(**{"max_steps": 3, "learning_rate": 0.1, **settings})
    return model, LocalTrainer(config, 0).train(model, examples(), seed=5)


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
    with pytest.raises(DivergedError, match=r"training diverged, .*; lower training.learning_rate"):
        trained(tiny_model(), learning_rate=1e30)


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
