"""The server's step along the clients' mean update Delta: with momentum, or adaptive for each element.

    sgd      m = momentum m + Delta                                         w -= rate m
    adagrad  m = beta1 m + (1 - beta1) Delta, v += Delta^2                  w -= rate m / (sqrt(v) + epsilon)
    adam     the same m,  v = beta2 v + (1 - beta2) Delta^2                 the same
    yogi     the same m,  v -= (1 - beta2) Delta^2 sign(v - Delta^2)        the same

sgd with momentum is FedAvgM (Hsu et al., arXiv 1909.06335, section 4.2), the others FedAdagrad, FedAdam and
FedYogi (Reddi et al., arXiv 2003.00295, algorithm 2), whose v begins at epsilon^2 and whose m is not divided
by what it lacks in the first rounds. Without momentum sgd is the plain step, which needs none of this.

Every party holds m and v and makes the same steps from what is relayed. All of it is single additions,
multiplications, divisions and roots of float32 (float64 for float64 parameters), each of them rounded as IEEE
754 says, so that processors and GPUs get the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ferret_ext.federated.config import ServerConfig

Add = Callable[[list[Tensor]], None]  # adds a round's mean update to tensors of the parameters' shapes


@dataclass
class ServerOptimizer:
    """What one party keeps. first: m of each parameter. second: v, empty with sgd."""

    config: ServerConfig
    first: list[Tensor]
    second: list[Tensor]

    @classmethod
    def on(cls, config: ServerConfig, params: Sequence[Tensor]) -> ServerOptimizer | None:
        """As a run begins; None where the plain step is wanted."""
        if config.plain:
            return None
        zeros = _zeros(params)
        adaptive = [] if config.optim == "sgd" else zeros
        return cls(config, zeros, [torch.full_like(zero, config.epsilon**2) for zero in adaptive])

    @property
    def moments(self) -> list[Tensor]:
        return [*self.first, *self.second]

    def names(self, params: Sequence[str]) -> list[str]:
        """What to call the moments of parameters with these names."""
        kinds = ["momentum"] if not self.second else ["first moment", "second moment"]
        return [f"{kind} of {name}" for kind in kinds for name in params]

    def agreed(self, digest: bytes) -> bytes:
        """A digest of what parties must agree on, with these settings in it."""
        return hashlib.sha256(digest + repr(self.config).encode()).digest()[: len(digest)]

    @torch.no_grad()
    def step(self, params: Sequence[Tensor], add: Add, rate: float) -> None:
        """w -= rate times the direction, each parameter rounded once to its dtype."""
        if self.config.optim == "sgd":
            torch._foreach_mul_(self.first, self.config.momentum)
            add(self.first)
            for param, m in zip(params, self.first, strict=True):
                param.copy_(param.to(m.dtype) - m * rate)
            return
        mean = _zeros(params)
        add(mean)
        beta1 = self.config.chosen_beta1
        for param, m, v, delta in zip(params, self.first, self.second, mean, strict=True):
            m.mul_(beta1).add_(delta * (1 - beta1))
            self._square(v, delta.square_())
            param.copy_(param.to(m.dtype) - (m * rate).div_(v.sqrt().add_(self.config.epsilon)))

    def _square(self, v: Tensor, square: Tensor) -> None:
        """The next v, from Delta^2."""
        beta2 = self.config.beta2
        if self.config.optim == "adagrad":
            v.add_(square)
        elif self.config.optim == "adam":
            v.mul_(beta2).add_(square.mul_(1 - beta2))
        else:
            v.sub_(torch.sign(v - square).mul_(square).mul_(1 - beta2))


def _zeros(params: Sequence[Tensor]) -> list[Tensor]:
    def wide(param: Tensor) -> torch.dtype:
        return torch.promote_types(param.dtype, torch.float32)

    return [torch.zeros_like(param, dtype=wide(param)) for param in params]
