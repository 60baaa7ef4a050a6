"""Every algorithm on one small model, with updates that no rounding touches: the same bytes anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from circle import Circle, seeded
from regression import loss
from torch import nn

from ferret_ext.federated import adapters, coordinates, wire
from ferret_ext.federated.admission import Sent
from ferret_ext.federated.algorithms import SEEDED
from ferret_ext.federated.algorithms.base import Algorithm, Values, pack
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.algorithms.ferret_reference import FerretReference
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import Coordinates, FerretConfig, ZerothOrderConfig
from ferret_ext.federated.dialogue import Dialogue
from ferret_ext.federated.secure.assembly import MaskedSum
from ferret_ext.federated.secure.ferret import SecureFerret
from ferret_ext.federated.server import Server
from ferret_ext.federated.wire import Message
from ferret_ext.federated.zeroth_order import with_published

CLIENTS = 3
RUN = b"the run."
FERRETS: dict[str, tuple[bool, Coordinates]] = {  # shared bases, coordinates
    "ferret": (False, "float32"),
    "ferret+float16": (False, "float16"),
    "ferret+int4": (False, "int4"),
    "ferret+choice8": (False, "choice8"),
    "ferret-round": (True, "float32"),
    "ferret-round+int4": (True, "int4"),
}
AVERAGED = ("fedavg", *adapters.PUBLISHED, "fedzo")


def toy(dtype: torch.dtype = torch.float32) -> nn.Module:
    """94 parameters, multiples of 1/8."""
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_((torch.arange(param.numel()) % 7 - 3).reshape(param.shape) / 8)
    return model


def eighths(count: int, client: int) -> wire.Array:
    return ((np.arange(count) + client) % 5 - 2).astype(np.float32) / 8


def no_training(*_: Any) -> float:
    raise AssertionError("updates are made up here")


def _ferret(name: str) -> Algorithm[Any]:
    shared, kind = FERRETS[name]
    config = FerretConfig(K=40, allocation="norm", coordinates=kind, server_warmup=0)
    return SharedFerret(config, 0.5, no_training, 3) if shared else Ferret(config, 0.5, no_training)


def _secure() -> Algorithm[Any]:
    return SecureFerret(FerretConfig(K=40, allocation="norm", server_warmup=0), 0.5, no_training, 3)


def _seeded(name: str) -> Algorithm[Any]:
    steps = 1 if name == "feedsign" else 3
    config = with_published(ZerothOrderConfig(steps=steps, perturbations=2, candidate_seeds=40), name)
    return SEEDED[name](config, 1.0, 17, loss)


ALGORITHMS: dict[str, Callable[[], Algorithm[Any]]] = {
    **{name: lambda name=name: _ferret(name) for name in FERRETS},  # type: ignore[misc]
    SecureFerret.name: _secure,
    "ferret-ref": lambda: FerretReference(FerretConfig(mode="reference-code", K=24), 0.5, no_training, 4, 77),
    **{name: lambda name=name: FedAvg(0.5, no_training, name) for name in AVERAGED},  # type: ignore[misc]
    **{name: lambda name=name: _seeded(name) for name in SEEDED},  # type: ignore[misc]
}


def serve(name: str, model: nn.Module | None = None, **settings: Any) -> Server[Any]:
    """A server of this algorithm at round 0, whose next round is open."""
    server = Server(ALGORITHMS[name](), model or toy(), range(CLIENTS), 1.0, 0, run=RUN, **settings)
    _assemble(server)
    return server


@dataclass(frozen=True, kw_only=True)
class Masked(MaskedSum):
    """A masked round whose clients forget that they were asked. hidden: what each one's update says."""

    circle: Circle
    hidden: dict[int, Values]

    def settle(self, updates: Updates, talk: Dialogue) -> Updates:
        return super().settle(updates, copy.deepcopy(self.circle).talk(self.about.round))


@cache
def masked_round(round_: int, K: int) -> Masked:
    """Of keys, seeds and shares that are the same every time."""
    circle = Circle(range(CLIENTS), seed=round_)
    assembly, hidden = circle.gather(round_), {}
    with patch("Crypto.Protocol.SecretSharing.rng", seeded(round_)):
        for client, participant in circle.participants.items():
            participant.join(assembly.invitation)
            hidden[client] = participant.hide((8 * eighths(K, client)).astype(np.int64) << 24)
    return Masked(**vars(assembly), circle=circle, hidden=hidden)


def _assemble(server: Server[Any]) -> None:
    """Opens the server's next round, where it takes that."""
    if server.algorithm.name == SecureFerret.name:
        server.assembly = masked_round(server.replica.round + 1, server.replica.plan.K)


def values_of(server: Server[Any], client: int) -> dict[str, wire.Value]:
    """What this client's update holds."""
    name, replica = server.algorithm.name, server.replica
    seed = 2**64 - 1 - client - CLIENTS * replica.round
    if name in FERRETS:
        chosen = replica.next_seed if name == "ferret-round" else seed
        kind = server.algorithm.config.chosen_coordinates
        gammas = eighths(coordinates.candidates(replica.plan, kind).K, client)
        written = coordinates.write(torch.from_numpy(gammas), replica.plan, kind)
        return {"contract": 0x10001, "seed": chosen, **written}
    if name == SecureFerret.name:
        masked = masked_round(replica.round + 1, replica.plan.K)
        return {"contract": 0x10001, "seed": replica.next_seed, **masked.hidden[client]}
    if name == "ferret-ref":
        counts = np.full(len(replica.plan.blocks), 5, np.uint32)
        return {"seed": seed, "counts": counts, "gammas": eighths(int(counts.sum()), client)}
    if name in ("fedkseed", "fedkseed-pro"):
        return {"candidates": np.array([7, 39, 7, client], np.uint16), "slopes": eighths(4, client)}
    if name == "decomfl":
        return {"slopes": eighths(6, client).reshape(3, 2)}
    if name == "feedsign":
        return {"votes": np.array([[1, client - 1]], np.int8)}
    return dict(pack(param * (client + 1) for param in replica.params))


def update(server: Server[Any], client_: int, **fields: Any) -> bytes:
    """This client's update for the server's next round."""
    replica = server.replica
    given = {"client": client_, "round": replica.round + 1, "weight": client_ + 1.0, **fields}
    values = given.pop("values", None) or values_of(server, client_)
    message = Message(
        server.algorithm.name,
        "update",
        replica.digest,
        values=values,
        run=replica.run,
        weights=replica.weights,
        **given,
    )
    return wire.encode(message)


def play(server: Server[Any]) -> list[bytes]:
    """The server's next round; the updates."""
    sent = [Sent(client, update(server, client)) for client in range(CLIENTS)]
    rejections = server.apply(range(CLIENTS), sent)[1]
    assert not rejections, rejections
    _assemble(server)
    return [payload for _, payload in sent]
