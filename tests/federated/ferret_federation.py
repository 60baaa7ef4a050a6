"""A run of Ferret around the small regression, with the settings of the paper unless told otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from federation import Federation, federate, train
from torch import Tensor, nn

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.config import FerretConfig

STEP = 0.4
SEEDS = ("per-client", "shared-round")
PUBLISHED: dict[str, Any] = {"K": 40, "coordinates": "float32", "allocation": "size", "server_warmup": 0}


def federation(model: nn.Module | None = None, *, verify_weights: bool = True, **settings: Any) -> Federation:
    config = FerretConfig(**{**PUBLISHED, **settings})
    shared = config.seeds == "shared-round"
    algorithm = SharedFerret(config, STEP, train, seed=9) if shared else Ferret(config, STEP, train)
    return federate(algorithm, model, verify_weights=verify_weights)


def basis_matrix(block: ferret_ext.Block, seed: int, basis: Any) -> Tensor:
    """V_l, float64 [d_l, K_l]."""

    def column(k: int) -> Tensor:
        return ferret_ext.basis(
            seed, k, (block.numel,), basis=basis, offset=block.offset, dtype=torch.float64
        )

    return torch.stack([column(k) for k in range(block.k)], dim=1)


def changed(message: bytes, **fields: Any) -> bytes:
    """The message with other fields, or other values."""
    decoded = wire.decode(message)
    values = {**decoded.values, **{name: fields.pop(name) for name in decoded.values if name in fields}}
    return wire.encode(dataclasses.replace(decoded, values=values, **fields))
