"""Training by losses alone: directional derivatives from two losses each, along directions that seeds name.

    g = (loss(w + eps z) - loss(w - eps z)) / (2 eps),    w <- w - learning_rate / P sum_p g_p z_p

(simultaneous perturbation, Spall 1992; in place for language models, MeZO, arXiv 2305.17333). z has
independent elements of mean 0 and variance 1, is regenerated from its seed wherever it is needed, and is
never held as a whole. No gradient and no second copy of the model is made: the memory is a forward pass's.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import ferret_ext
from ferret_ext.checks import KINDS
from ferret_ext.federated import progress
from ferret_ext.federated.client import DivergedError, LocalFailure, endless_batches
from ferret_ext.federated.config import ZerothOrderConfig
from ferret_ext.federated.data.tokens import Example, collate
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.settings import ConfigError
from ferret_ext.ops import VARIANCE, Basis

Term = tuple[int, float]  # seed of a direction z, and what z is multiplied by
Loss = Callable[[Any, Sequence[Example]], float]  # model, batch -> loss; draws no random numbers
T = TypeVar("T")
Slopes = npt.NDArray[np.float64]  # [T, P], NaN where a loss was not finite

# What was published for each algorithm. FedZO and FedKSeed: as run for arXiv 2409.06277 and 2312.06353;
# DeComFL: the defaults of its authors' code (github.com/ZidongLiu/DeComFL), which FeedSign is given too.
PUBLISHED: dict[str, dict[str, Any]] = {
    "fedzo": {"steps": 200, "perturbations": 1, "learning_rate": 3e-7, "eps": 5e-4},
    "fedkseed": {"steps": 200, "perturbations": 1, "learning_rate": 3e-7, "eps": 5e-4},
    "fedkseed-pro": {"steps": 200, "perturbations": 1, "learning_rate": 3e-7, "eps": 5e-4},
    "decomfl": {"steps": 1, "perturbations": 1, "learning_rate": 1e-4, "eps": 1e-3},
    "feedsign": {"steps": 1, "perturbations": 1, "learning_rate": 1e-4, "eps": 1e-3},
}


def with_published(config: ZerothOrderConfig, algorithm: str) -> ZerothOrderConfig:
    """The config with the algorithm's published values where it has none."""
    missing = {key: value for key, value in PUBLISHED[algorithm].items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing)


def agreement(config: ZerothOrderConfig) -> str:
    """The settings that server and clients must have in common."""
    return repr(dataclasses.replace(config, perturbation="auto", snapshot="memory"))


# ---- directions ----


class Directions(Protocol):
    """Where a seed's z comes from."""

    def add_(self, params: Sequence[Tensor], terms: Sequence[Term]) -> None:
        """params += sum_i c_i z_i."""


@dataclass(frozen=True)
class StreamDirections:
    """z = v_0 / sqrt(rho): the first column of the seed's basis over all parameters as one block.

    The same bits on every machine. A call reads and writes each parameter once, however many terms it has.
    """

    plan: ferret_ext.BlockPlan
    basis: Basis

    @classmethod
    def of(cls, named: Sequence[tuple[str, Tensor]], basis: Basis) -> StreamDirections:
        total = sum(tensor.numel() for _, tensor in named)
        return cls(ferret_ext.BlockPlan.from_parameters(named, 1, granularity=max(total, 1)), basis)

    @property
    def scale(self) -> float:
        """1 / sqrt(rho): the basis has elements of variance rho, z of variance 1."""
        return math.sqrt(self.plan.blocks[0].numel / VARIANCE[KINDS[self.basis]])

    def add_(self, params: Sequence[Tensor], terms: Sequence[Term]) -> None:
        one = torch.ones(1, device=params[0].device)
        updates = [(seed, one, coefficient) for seed, coefficient in terms]
        ferret_ext.apply_(self.plan, params, updates, self.scale, basis=self.basis)

    def add_shard_(self, tensor: Tensor, seed: int, coefficient: float, offset: int) -> None:
        """tensor += c z[offset : offset + tensor.numel()], for elements of one parameter."""
        one = torch.ones(1, device=tensor.device)
        numel, alpha = self.plan.blocks[0].numel, coefficient * self.scale
        ferret_ext.reconstruct_(tensor, one, seed, alpha=alpha, basis=self.basis, offset=offset, numel=numel)


class TorchDirections:
    """z from torch's generator: standard normal, one draw a parameter in order, in the parameter's dtype.

    As other implementations draw it, for a like-for-like comparison. Bits depend on device and torch version.
    """

    def add_(self, params: Sequence[Tensor], terms: Sequence[Term]) -> None:
        generator = torch.Generator(params[0].device)
        for seed, coefficient in terms:
            generator.manual_seed(seed % 2**63)
            for param in params:
                z = torch.randn(param.shape, generator=generator, dtype=param.dtype, device=param.device)
                param.add_(z, alpha=coefficient)


# ---- losses at w + eps z and w - eps z ----


class Perturbation(Protocol):
    """How a model is evaluated off its weights."""

    def losses(self, evaluate: Callable[[], float], seed: int, eps: float) -> tuple[float, float]:
        """The losses at w + eps z and at w - eps z."""


@dataclass(frozen=True)
class InPlace:
    """All parameters move by +eps z, -2 eps z, +eps z, as in MeZO.

    They come back up to three roundings: within 1.5 units in the last place (ulp) of |w| + eps |z|, so in
    float32 with an error far below any step, in bfloat16 often an ulp off, after every step anew.
    """

    params: Sequence[Tensor]
    directions: Directions

    def losses(self, evaluate: Callable[[], float], seed: int, eps: float) -> tuple[float, float]:
        self.directions.add_(self.params, [(seed, eps)])
        plus = evaluate()
        self.directions.add_(self.params, [(seed, -2 * eps)])
        minus = evaluate()
        self.directions.add_(self.params, [(seed, eps)])
        return plus, minus


class Layerwise:
    """Each module computes with a perturbed copy of its own parameters, dropped when it is done.

    The parameters themselves are never written, so they stay as they are to the bit. The extra memory is one
    module's own parameters, at most the largest one's. Raises ConfigError where a module reads parameters
    that another module holds, without calling that one.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], directions: StreamDirections) -> None:
        starts = accumulate((param.numel() for param in params), initial=0)
        self._offsets = {id(param): start for param, start in zip(params, starts, strict=False)}
        self._owners = [
            (module, own)
            for module in model.modules()
            if (own := [p for p in module.parameters(recurse=False) if id(p) in self._offsets])
        ]
        self._directions = directions

    def losses(self, evaluate: Callable[[], float], seed: int, eps: float) -> tuple[float, float]:
        with self._moved(seed, eps):
            plus = evaluate()
        with self._moved(seed, -eps):
            minus = evaluate()
        return plus, minus

    @contextmanager
    def _moved(self, seed: int, eps: float) -> Iterator[None]:
        away: dict[int, Tensor] = {}  # the weights of parameters that a running module has perturbed
        used: set[int] = set()

        def enter(own: Sequence[Tensor]) -> list[Tensor]:
            mine = [param for param in own if id(param) not in away]  # a tied one may be perturbed already
            for param in mine:
                away[id(param)] = param.data
                copy = param.data.clone()
                self._directions.add_shard_(copy, seed, eps, self._offsets[id(param)])
                param.data = copy
            used.update(map(id, mine))
            return mine

        def leave(mine: Sequence[Tensor]) -> None:
            for param in mine:
                param.data = away.pop(id(param))

        handles = [handle for module, own in self._owners for handle in _around(module, own, enter, leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if len(used) < len(self._offsets):
            raise ConfigError(
                f"zeroth_order.perturbation: expected modules that compute with their own parameters, "
                f"{len(self._offsets) - len(used)} of {len(self._offsets)} parameters were used by others or "
                "not at all; choose in_place"
            )


def _around(
    module: nn.Module,
    own: Sequence[Tensor],
    enter: Callable[[Sequence[Tensor]], list[Tensor]],
    leave: Callable[[Sequence[Tensor]], None],
) -> list[Any]:
    """Calls `enter` before and `leave` after each forward pass of the module, also of one that fails."""
    entered: list[list[Tensor]] = []
    return [
        module.register_forward_pre_hook(lambda *_: entered.append(enter(own))),
        module.register_forward_hook(lambda *_: leave(entered.pop()), always_call=True),
    ]


# ---- steps ----


@dataclass(frozen=True)
class Walk:
    """Zeroth-order steps on one model. params: its trainable parameters, changed in place."""

    model: Any
    params: Sequence[Tensor]
    directions: Directions
    perturbation: Perturbation
    loss: Loss
    batch_size: int
    config: ZerothOrderConfig  # with the published values filled in

    @classmethod
    def on(cls, model: Any, loss: Loss, batch_size: int, config: ZerothOrderConfig) -> Walk:
        """Raises ConfigError for a model without trainable parameters."""
        try:
            streams = StreamDirections.of(list(model.named_parameters()), config.basis)
        except ValueError as error:
            raise ConfigError(f"zeroth_order: {error}") from None
        params = streams.plan.select(model.named_parameters())
        if config.generator == "torch":
            drawn = TorchDirections()
            return cls(model, params, drawn, InPlace(params, drawn), loss, batch_size, config)
        in_place = config.perturbation == "in_place"
        perturbation = InPlace(params, streams) if in_place else Layerwise(model, params, streams)
        return cls(model, params, streams, perturbation, loss, batch_size, config)

    @torch.no_grad()
    def run(
        self, examples: Sequence[Example], seed: int, directions: Sequence[Sequence[int]], *, last_step: bool
    ) -> tuple[Slopes, float]:
        """T steps along P directions each; the slopes [T, P] and the mean of all finite losses.

        seed: of the order of the examples. directions: [T][P] seeds. last_step: false where nobody needs the
        weights after step T. The model is in evaluation mode, without dropout. Where a loss is not finite the
        slope is NaN and its direction is left out of the step. Raises DivergedError where all are, and
        LocalFailure where there are no examples.
        """
        if not examples:
            raise LocalFailure("it holds no examples")
        slopes = np.full((len(directions), len(directions[0])), np.nan)
        losses: list[float] = []
        batches = endless_batches(len(examples), self.batch_size, seed)
        self.model.eval()
        for t, seeds in progress.each("local", enumerate(directions), len(directions)):
            batch = [examples[i] for i in next(batches)]
            for p, direction in enumerate(seeds):
                slopes[t, p] = self._slope(batch, direction, losses)
            if last_step or t + 1 < len(directions):
                self.step(seeds, slopes[t].tolist())
        if not losses:
            raise DivergedError("no step had a finite loss; lower zeroth_order.learning_rate")
        return slopes, math.fsum(losses) / len(losses)

    @torch.no_grad()
    def step(self, seeds: Sequence[int], slopes: Sequence[float]) -> None:
        """w -= learning_rate / P sum_p g_p z_p, over the finite g_p."""
        rate = given(self.config.learning_rate) / len(seeds)
        terms = [(s, -rate * g) for s, g in zip(seeds, slopes, strict=True) if math.isfinite(g) and g != 0]
        if terms:
            self.directions.add_(self.params, terms)

    def _slope(self, batch: Sequence[Example], direction: int, losses: list[float]) -> float:
        """g, or NaN; appends the mean of the two losses if g is finite."""
        eps = given(self.config.eps)
        plus, minus = self.perturbation.losses(lambda: self.loss(self.model, batch), direction, eps)
        slope = (plus - minus) / (2 * eps)
        if not math.isfinite(slope):
            return math.nan
        losses.append((plus + minus) / 2)
        return slope


@dataclass(frozen=True)
class ZerothOrderTrainer:
    """Local training by zeroth-order steps, in the place of a first-order optimiser's: FedZO's clients.

    FedZO (Fang et al., IEEE TSP 2022, arXiv 2201.09531) is federated averaging over them.
    """

    config: ZerothOrderConfig  # with the published values filled in
    loss: Loss
    batch_size: int

    def train(self, model: Any, examples: Sequence[Example], seed: int, client: int = 0) -> float:
        """T steps over the examples, whose order and directions follow from `seed`; the mean loss.

        Raises DivergedError where no loss is finite.
        """
        walk = Walk.on(model, self.loss, self.batch_size, self.config)
        directions = direction_seeds(seed, given(self.config.steps), given(self.config.perturbations))
        return walk.run(examples, seed, directions, last_step=True)[1]


def direction_seeds(seed: int, steps: int, perturbations: int) -> list[list[int]]:
    """[T][P] seeds of directions that all follow from one."""
    return [[derive(seed, "direction", t, p) for p in range(perturbations)] for t in range(steps)]


def batch_loss(model: Any, batch: Sequence[Example], pad_token_id: int) -> float:
    """A causal language model's mean cross-entropy over the batch's response tokens."""
    tensors = collate(batch, pad_token_id, model.device)
    with torch.no_grad():
        loss: float = model(**tensors, use_cache=False).loss.item()
    return loss


def given(value: T | None) -> T:
    """A setting that `with_published` has filled in."""
    assert value is not None, "settings without published values"
    return value


class Snapshot:
    """The values of parameters at one moment, to which they can go back bit for bit.

    on_disk: in an unnamed file in the folder for temporary files (TMPDIR), read back one parameter at a time,
    so that no second copy of the model is in memory; false: in memory.
    """

    def __init__(self, on_disk: bool) -> None:
        self._file: IO[bytes] | None = tempfile.TemporaryFile() if on_disk else None  # noqa: SIM115
        self._copies: list[Tensor] = []

    def take(self, params: Sequence[Tensor]) -> None:
        if self._file is None:
            self._copies = [param.detach().clone() for param in params]
            return
        self._file.seek(0)
        for param in params:
            self._file.write(_bytes_of(param.detach().cpu().contiguous()))
        self._file.flush()

    @torch.no_grad()
    def restore(self, params: Sequence[Tensor]) -> None:
        if self._file is None:
            for param, copy in zip(params, self._copies, strict=True):
                param.copy_(copy)
            return
        self._file.seek(0)
        for param in params:
            read = torch.empty(param.shape, dtype=param.dtype)
            self._file.readinto(_bytes_of(read))  # type: ignore[attr-defined]
            param.copy_(read)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
