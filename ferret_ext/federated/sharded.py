"""Training by several processes that hold a part of the model each (FSDP2), to what one process would get.

A step's batches are dealt out over the ranks. What a rank's examples weigh in the step's gradient does not
depend on where they went, so the result is that of one process, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ferret_ext import fsdp
from ferret_ext.federated.client import DIVERGED, DivergedError, LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data.tokens import Example, collate
from ferret_ext.federated.settings import ConfigError

Batches = Sequence[Sequence[Example]]


def check(config: SimulationConfig) -> None:
    """Raises ConfigError for what several processes cannot do together."""
    for key, expected, got in (
        ("algorithm", "ferret", config.algorithm),
        ("adapter.type", "none", config.adapter.type),
        ("training.torch_compile", False, config.training.torch_compile),
        ("ferret.secure_aggregation", False, config.ferret.secure_aggregation),
        ("server.optim", "sgd", config.server.optim),
        ("server.momentum", 0, config.server.momentum),
    ):
        if got != expected:
            raise ConfigError(f"{key}: expected {expected} with several processes a client, got {got}")


def cut(model: Any, mesh: DeviceMesh) -> None:
    """Cuts the model's parameters by rows over the mesh and moves them to its device, layer by layer.

    Layers are what transformers keeps on one device. Gradients of 16 bits are summed over ranks in float32.
    Raises ConfigError for parameters of several dtypes, which FSDP2 does not take.
    """
    dtypes = {param.dtype for param in model.parameters()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(f"dtype: expected one of all parameters with several processes, got {names}")
    narrow = next(iter(dtypes)).itemsize < 4
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    for module in [*reversed(layers), model]:  # what lies within first
        fully_shard(module, mesh=mesh, mp_policy=policy)


@dataclass(frozen=True)
class Part:
    """The examples [start, stop) of one batch of a step. idle: one that counts for nothing, computed because
    all ranks must make as many passes."""

    batch: int
    start: int
    stop: int
    idle: bool = False


def deal(sizes: Sequence[int], ranks: int) -> list[list[Part]]:
    """The parts of each rank, equally many, of batches of so many examples.

    Whole batches, where they can be shared out evenly, else parts of them of one size as far as possible.
    """
    pieces = ranks // math.gcd(ranks, len(sizes))
    parts = []
    for batch, size in enumerate(sizes):
        count = min(pieces, size)
        bounds = [size * i // count for i in range(count + 1)]
        parts += [Part(batch, start, stop) for start, stop in pairwise(bounds)]
    parts += [Part(0, 0, 1, idle=True)] * (-len(parts) % ranks)
    return [parts[rank::ranks] for rank in range(ranks)]


class ShardedTrainer(LocalTrainer):
    """A `LocalTrainer` for a model that `cut` has cut; all ranks call it alike, with the same examples.

    Steps and weights are those of one process, to rounding; dropout is drawn otherwise. `states` has what
    belongs to this rank's part of the parameters. What is raised is raised on all ranks.
    """

    def _held(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """Optimisers go element by element, so that each rank can step with its own part."""
        return [nn.Parameter(part) for part in fsdp.local(params)]

    def _draws(self, seed: int) -> int:
        """Another one on each rank, whose examples are others."""
        return (seed + dist.get_rank()) % 2**63

    def _all_finite(self, params: list[nn.Parameter]) -> bool:
        unfit = sum(int(not part.isfinite().all()) for part in fsdp.local(params))
        return not fsdp.total(torch.tensor([float(unfit)], device=params[0].device), params).item()

    def _step(self, model: Any, params: list[nn.Parameter], optimizer: Any, batches: Batches) -> list[float]:
        optimizer.zero_grad(set_to_none=True)
        for param in params:  # what is left of a step that diverged
            param.grad = None
        losses = self._backward(model, params, batches)
        if not all(map(math.isfinite, losses)):
            raise DivergedError(DIVERGED)
        held = optimizer.param_groups[0]["params"]
        for part, here, param in zip(held, fsdp.local(params), params, strict=True):
            if part.data_ptr() != here.data_ptr():
                raise RuntimeError("sharded: expected FSDP2 to leave parts where they are, got another place")
            part.grad = None if param.grad is None else fsdp.local([param.grad])[0]
            param.grad = None
        if self.config.max_grad_norm is not None:
            own = nn.utils.get_total_norm([part.grad for part in held if part.grad is not None])
            norm = fsdp.total(own.double().square(), params).sqrt()
            nn.utils.clip_grads_with_norm_(held, self.config.max_grad_norm, norm.to(own.dtype))
        optimizer.step()
        return losses

    def _backward(self, model: Any, params: list[nn.Parameter], batches: Batches) -> list[float]:
        """The step's gradient in the parameters, and the loss of each batch, on all ranks.

        A batch's loss is its parts' by the number of their tokens. FSDP2 takes the mean over the ranks.
        """
        ranks = dist.get_world_size()
        losses = torch.zeros(len(batches), dtype=torch.float64, device=model.device)
        for part in deal([len(batch) for batch in batches], ranks)[dist.get_rank()]:
            batch = batches[part.batch]
            examples = batch[part.start : part.stop]
            share = 0.0 if part.idle else num_tokens(examples) / num_tokens(batch)
            loss = model(**collate(examples, self.pad_token_id, model.device), use_cache=False).loss
            (loss * (share * ranks / len(batches))).backward()
            losses[part.batch] += share * loss.detach()
        return fsdp.total(losses, params).tolist()


def num_tokens(examples: Sequence[Example]) -> int:
    """How many tokens carry loss; a first token never does, since nothing predicts it."""
    return sum(len(example.input_ids) - max(1, example.prompt_length) for example in examples)
