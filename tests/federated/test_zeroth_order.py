"""Zeroth-order steps against materialised directions and autograd, and what becomes of the weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from regression import EXAMPLES, direction, flat, loss, table, toy, walk_by_the_book
from torch import nn
from toy import examples, tiny_model

from ferret_ext.federated.client import DivergedError, endless_batches
from ferret_ext.federated.config import ZerothOrderConfig, build
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.zeroth_order import (
    PUBLISHED,
    InPlace,
    Layerwise,
    Snapshot,
    StreamDirections,
    TorchDirections,
    Walk,
    ZerothOrderTrainer,
    batch_loss,
    direction_seeds,
    with_published,
)
from ferret_ext.ops import Basis

BASES: tuple[Basis, ...] = ("rademacher", "uniform", "gaussian")
RATE, EPS = 0.01, 1e-3


def settings(**changed: Any) -> ZerothOrderConfig:
    given = {"steps": 6, "perturbations": 2, "learning_rate": RATE, "eps": EPS}
    return ZerothOrderConfig(**{**given, **changed})


def walk(model: nn.Module, batch_size: int = 2, **changed: Any) -> Walk:
    return Walk.on(model, loss, batch_size, settings(**changed))


@pytest.mark.parametrize("basis", BASES)
def test_directions_are_the_streams_with_variance_1(basis: Basis) -> None:
    model = toy()
    before = flat(list(model.parameters()))
    streams = StreamDirections.of(list(model.named_parameters()), basis)
    with torch.no_grad():
        streams.add_(list(model.parameters()), [(7, 0.5), (8, -2.0)])
    expected = before + 0.5 * direction(7, before.numel(), basis) - 2 * direction(8, before.numel(), basis)
    torch.testing.assert_close(flat(list(model.parameters())), expected, rtol=0, atol=1e-12)
    z = direction(9, 100_000, basis)
    assert z.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 100_000))


@pytest.mark.parametrize("basis", BASES)
def test_a_shard_of_a_direction_is_its_part(basis: Basis) -> None:
    model = toy()
    streams = StreamDirections.of(list(model.named_parameters()), basis)
    z, at = direction(7, flat(list(model.parameters())).numel(), basis), 0
    for param in model.parameters():
        shard = torch.zeros(param.shape, dtype=torch.float64)
        streams.add_shard_(shard, 7, 0.25, at)
        torch.testing.assert_close(shard.flatten(), 0.25 * z[at : at + param.numel()], rtol=0, atol=1e-12)
        at += param.numel()


@pytest.mark.parametrize("perturbation", ["layerwise", "in_place"])
@pytest.mark.parametrize("basis", BASES)
def test_steps_are_those_of_materialised_directions(basis: Basis, perturbation: str) -> None:
    model = toy()
    start, seeds = flat(list(model.parameters())), direction_seeds(3, 6, 2)
    slopes, mean = walk(model, basis=basis, perturbation=perturbation).run(EXAMPLES, 4, seeds, last_step=True)
    order = endless_batches(len(EXAMPLES), 2, 4)
    batches = [[EXAMPLES[i] for i in next(order)] for _ in range(6)]
    zs = [[direction(seed, start.numel(), basis) for seed in row] for row in seeds]
    expected, expected_slopes = walk_by_the_book(start, zs, batches, RATE, EPS)
    torch.testing.assert_close(torch.from_numpy(slopes), expected_slopes, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(flat(list(model.parameters())), expected, rtol=0, atol=1e-10)
    assert (expected - start).norm() > 0.01
    assert mean == pytest.approx(sum(loss(toy(), batch) for batch in batches) / 6, rel=0.2)


def test_torch_directions_are_draws_of_one_seeded_generator() -> None:
    """A parameter after the other, as in MeZO's code: manual_seed, then one normal tensor each."""
    model = toy()
    before = [param.detach().clone() for param in model.parameters()]
    with torch.no_grad():
        TorchDirections().add_(list(model.parameters()), [(11, 0.5)])
    torch.manual_seed(11)
    for param, old in zip(model.parameters(), before, strict=True):
        z = torch.normal(mean=0.0, std=1.0, size=param.shape, dtype=param.dtype)
        torch.testing.assert_close(param.detach(), old + 0.5 * z)
    assert isinstance(walk(toy(), generator="torch").perturbation, InPlace)


@pytest.mark.parametrize("perturbation", ["layerwise", "in_place"])
def test_a_slope_is_the_gradient_along_the_direction(perturbation: str) -> None:
    model = toy()
    x, y = table(torch.float64)
    (model(x) - y).square().mean().backward()
    gradient = flat([param.grad for param in model.parameters()])  # type: ignore[misc]
    made = walk(model, len(EXAMPLES), perturbation=perturbation)
    slopes, _ = made.run(EXAMPLES, 0, [[5, 6]], last_step=False)
    for seed, slope in zip([5, 6], slopes[0], strict=True):
        assert slope == pytest.approx(
            (gradient @ direction(seed, gradient.numel(), "gaussian")).item(), rel=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layerwise_leaves_every_bit_and_sees_what_in_place_sees(dtype: torch.dtype) -> None:
    """On a Llama with tied embeddings, whose shared matrix two modules perturb alike."""
    model, other = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    before = [param.detach().clone() for param in model.parameters()]
    streams = StreamDirections.of(list(model.named_parameters()), "gaussian")
    data = examples(4)
    with torch.no_grad():
        layers = Layerwise(model, list(model.parameters()), streams)
        got = layers.losses(lambda: batch_loss(model, data, 0), 3, 0.01)
        moved = InPlace(list(other.parameters()), streams)
        expected = moved.losses(lambda: batch_loss(other, data, 0), 3, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert got[0] != got[1]
    assert got == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 0.02)


def test_layerwise_restores_weights_and_hooks_after_an_error() -> None:
    model = toy()
    before = [param.detach().clone() for param in model.parameters()]
    made = walk(model)
    model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.run(EXAMPLES, 0, [[1]], last_step=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model[0]._forward_pre_hooks


def test_layerwise_refuses_parameters_that_others_read() -> None:
    model = nn.MultiheadAttention(4, 1)
    x = torch.randn(3, 1, 4)
    evaluate = lambda m, _: m(x, x, x, need_weights=False)[0].square().mean().item()  # noqa: E731
    with pytest.raises(
        ConfigError, match=r"zeroth_order.perturbation: .*, 2 of 4 parameters .* choose in_place"
    ):
        Walk.on(model, evaluate, 1, settings()).run(EXAMPLES, 0, [[1]], last_step=True)
    Walk.on(model, evaluate, 1, settings(perturbation="in_place")).run(EXAMPLES, 0, [[1]], last_step=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_comes_back_within_one_and_a_half_ulp(dtype: torch.dtype) -> None:
    """Of |w| + eps |z|: three roundings of at most half an ulp. Not to the bit, unlike layerwise."""
    torch.manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(5000)).to(dtype))]
    streams = StreamDirections.of([("w", params[0])], "gaussian")
    before, eps = params[0].detach().clone(), 5e-4
    with torch.no_grad():
        InPlace(params, streams).losses(lambda: 0.0, 3, eps)
    error = (params[0].detach().double() - before.double()).abs()
    far = (before.double().abs() + eps * direction(3, 5000, "gaussian").abs()).to(dtype)
    ulp = torch.exp2(torch.frexp(far.float()).exponent.double()) * torch.finfo(dtype).eps / 2
    assert (error <= 1.5 * ulp).all()
    assert (error > 0).any()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_snapshot_gives_every_bit_back(on_disk: bool, dtype: torch.dtype) -> None:
    params = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype), torch.randn(4, 3).to(dtype).T]
    snapshot = Snapshot(on_disk)
    for _ in range(2):
        before = [param.clone() for param in params]
        snapshot.take(params)
        for param in params:
            param.add_(1)
        snapshot.restore(params)
        snapshot.restore(params)
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        params[0].mul_(2)


def test_losses_that_are_not_finite_are_left_out() -> None:
    model, start = toy(), flat(list(toy().parameters()))
    failures = iter([math.nan, 1.0, 1.0, math.inf])  # one in each of the first two steps

    def failing(model: Any, batch: Any) -> float:
        return loss(model, batch) * next(failures, 1.0)

    made = Walk.on(model, failing, 1, settings())
    slopes, mean = made.run(EXAMPLES, 0, direction_seeds(0, 4, 1), last_step=True)
    missing = [bool(math.isnan(g)) for g in slopes[:, 0]]
    assert missing == [True, True, False, False]
    assert math.isfinite(mean)
    assert flat(list(model.parameters())).isfinite().all()
    assert not torch.equal(flat(list(model.parameters())), start)


def test_a_walk_without_any_finite_loss_has_diverged() -> None:
    made = Walk.on(toy(), lambda *given: loss(*given) * math.nan, 1, settings())
    with pytest.raises(DivergedError, match=r"lower zeroth_order\.learning_rate"):
        made.run(EXAMPLES, 0, [[1]], last_step=True)


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.Dropout(0.5), nn.Linear(7, 3)).double().train()
    first, second = (walk(model).run(EXAMPLES, 0, [[1, 1]], last_step=False)[0] for _ in range(2))
    assert first[0, 0] == first[0, 1] == second[0, 0]


def test_trainer_moves_trainable_parameters_only() -> None:
    model = tiny_model()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    before, others = frozen.clone(), flat([p for p in model.parameters() if p.requires_grad])
    evaluate = partial(batch_loss, pad_token_id=0)
    trainer = ZerothOrderTrainer(settings(), evaluate, 2)
    mean = trainer.train(model, examples(), 5)
    assert torch.equal(frozen, before)
    assert not torch.equal(others, flat([p for p in model.parameters() if p.requires_grad]))
    again = tiny_model()
    again.model.embed_tokens.weight.requires_grad_(False)
    assert trainer.train(again, examples(), 5) == mean
    assert torch.equal(flat(list(again.parameters())), flat(list(model.parameters())))
    with pytest.raises(ConfigError, match="expected a non-empty parameter that requires grad"):
        trainer.train(tiny_model().requires_grad_(False), examples(), 5)


def test_many_steps_lower_the_loss() -> None:
    model = toy()
    before = loss(model, EXAMPLES)
    walk(model, len(EXAMPLES), learning_rate=0.02).run(
        EXAMPLES, 0, direction_seeds(0, 200, 1), last_step=True
    )
    assert loss(model, EXAMPLES) < 0.8 * before


@pytest.mark.parametrize("algorithm", PUBLISHED)
def test_published_values_fill_in_what_is_not_given(algorithm: str) -> None:
    filled = with_published(ZerothOrderConfig(eps=0.5), algorithm)
    assert filled.eps == 0.5
    assert filled.steps == (200 if "zo" in algorithm or "kseed" in algorithm else 1)
    assert filled.learning_rate == PUBLISHED[algorithm]["learning_rate"]


def test_torch_gives_no_direction_layer_by_layer() -> None:
    needed = [("model", "m"), ("data", "d"), ("out", "o"), ("zeroth_order.generator", "torch")]
    with pytest.raises(ConfigError, match=r"zeroth_order\.perturbation: expected in_place or auto"):
        build([*needed, ("zeroth_order.perturbation", "layerwise")])
