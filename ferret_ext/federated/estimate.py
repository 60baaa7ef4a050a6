"""What a run will take, before anything heavy is loaded: memory, disk and traffic, from the shapes alone.

Bytes of messages are exact but for a few of their heads, since numbers take less room when they are small.
Memory is an estimate: what a step of training holds besides weights and gradients depends on the model's
code. It supposes layers as Llama has them, and records as long as they may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ferret_ext.federated import coordinates, models, wire
from ferret_ext.federated.algorithms.base import stream_contract, trainable
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret, first_plan
from ferret_ext.federated.algorithms.ferret_reference import FerretReference
from ferret_ext.federated.algorithms.plans import make_plan
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data.protocols import PROTOCOLS
from ferret_ext.federated.secure import masks, messages
from ferret_ext.federated.wire import Message
from ferret_ext.federated.zeroth_order import PUBLISHED, given, with_published
from ferret_ext.plan import BlockPlan

LARGE = 2**63  # stands for any seed


@dataclass(frozen=True)
class Traffic:
    """Bytes of one message each: a client's update, the broadcast after a round of `chosen` clients.

    answers, requests: of a client in a round, beside these. clients: how many there are in all. relayed: a
    client that was away gets every broadcast that it missed. at_most: the sizes of updates depend on the
    training, and these are the largest.
    """

    update: int
    broadcast: int
    chosen: int
    clients: int
    relayed: bool
    at_most: bool
    answers: int = 0
    requests: int = 0

    def up(self, rounds: int) -> int:
        """Bytes that all clients send in so many rounds."""
        return rounds * self.chosen * (self.update + self.answers)

    def down(self, rounds: int) -> int:
        """Bytes that all clients receive, on average over who is drawn. The last broadcast reaches nobody.

        Round r's reaches a client in any round after it in which the client is drawn.
        """
        asked = rounds * self.chosen * self.requests
        if not self.relayed:
            return (rounds - 1) * self.chosen * self.broadcast + asked
        away = 1 - self.chosen / self.clients
        reached = rounds - 1 - sum(away**later for later in range(1, rounds))
        return round(reached * self.clients * self.broadcast) + asked


# ---- traffic ----


def clients_of(config: SimulationConfig) -> int | None:
    """How many clients there will be; None where only the data tells."""
    protocol = PROTOCOLS[config.dataset.protocol]
    kind = protocol.kind if config.partition.kind == "auto" else config.partition.kind
    if config.num_clients is None and kind != "natural-id":
        return protocol.num_clients
    return config.num_clients


def name_of(config: SimulationConfig) -> str:
    """What the messages call the algorithm."""
    if config.algorithm != "ferret":
        return config.algorithm
    if config.ferret.mode == "reference-code":
        return FerretReference.name
    if config.ferret.secure_aggregation:
        return messages.NAME
    return SharedFerret.name if config.ferret.seeds == "shared-round" else Ferret.name


def plan_of(config: SimulationConfig, model: Any) -> BlockPlan | None:
    """The first round's plan; None for algorithms without one. Raises ConfigError."""
    if config.algorithm != "ferret":
        return None
    ferret = config.ferret
    if ferret.mode == "paper":
        return first_plan(ferret, model)
    plan = make_plan(model, None, ferret.chosen_granularity, "equal")
    return plan.with_allocation("equal", ferret.K * len(plan.blocks))


def traffic(config: SimulationConfig, model: Any) -> Traffic:
    """The messages of a run on this model. Raises ConfigError."""
    plan = plan_of(config, model)
    clients = clients_of(config) or 1
    chosen = max(1, round(config.client_fraction * clients))
    update = _update(config, model, plan, chosen)
    broadcast = _broadcast(config, model, plan, update, chosen)
    at_most = config.algorithm == "ferret" and config.ferret.mode == "reference-code"
    more = messages.overhead(chosen) if name_of(config) == messages.NAME else (0, 0)
    return Traffic(update, broadcast, chosen, clients, relayed(config), at_most, *more)


def relayed(config: SimulationConfig) -> bool:
    """Whether broadcasts stand on each other, so that a client needs all of them."""
    return config.algorithm in ("ferret", "decomfl", "feedsign") or not config.server.plain


def _update(config: SimulationConfig, model: Any, plan: BlockPlan | None, clients: int) -> int:
    """Bytes of a client's update."""
    algorithm = name_of(config)
    if plan is not None:
        first: dict[str, Any] = {"contract": stream_contract(config.ferret.chosen_basis), "seed": LARGE}
        if algorithm == FerretReference.name:
            return _size(algorithm, {**first, "counts": (4, len(plan.blocks)), "gammas": (4, plan.K)})
        if algorithm == messages.NAME:
            masked = {"session": bytes(masks.SESSION_BYTES), "masked": (4, plan.K)}
            return _size(algorithm, {**first, **masked, "sealed": (1, clients, masks.SEALED_BYTES)})
        return _size(algorithm, {**first, **coordinates.blank(plan, config.ferret.chosen_coordinates)})
    if algorithm in PUBLISHED and algorithm != "fedzo":
        chosen = with_published(config.zeroth_order, algorithm)
        steps, directions = given(chosen.steps), given(chosen.perturbations)
        if algorithm == "feedsign":
            return _size(algorithm, {"votes": (1, 1, directions)})
        if algorithm == "decomfl":
            return _size(algorithm, {"slopes": (4, steps, directions)})
        wide = 4 if chosen.candidate_seeds > 65536 else 2
        count = steps * directions
        return _size(algorithm, {"candidates": (wide, count), "slopes": (4, count)})
    return _size_of_whole(algorithm, model)


def _broadcast(config: SimulationConfig, model: Any, plan: BlockPlan | None, update: int, chosen: int) -> int:
    """Bytes of what the server relays after a round."""
    algorithm = name_of(config)
    if plan is not None:
        first: dict[str, Any] = {"contract": stream_contract(config.ferret.chosen_basis), "step": 1.0}
        if algorithm == FerretReference.name:
            return _size(algorithm, {**first, "pool": (4, plan.K)})
        if config.ferret.seeds == "shared-round":
            reaches = {"reaches": (2, len(plan.blocks))} if algorithm == messages.NAME else {}
            return _size(algorithm, {**first, "gammas": (4, plan.K), "next_seed": LARGE, **reaches})
        return _size(algorithm, {**first, "updates": [bytes(update)] * chosen})
    if algorithm.startswith("fedkseed"):
        candidates = config.zeroth_order.candidate_seeds
        pro = {name: (4, candidates) for name in ("magnitudes", "visits") if algorithm == "fedkseed-pro"}
        return _size(algorithm, {"seed": LARGE, "sums": (4, candidates), **pro})
    if algorithm in ("decomfl", "feedsign"):
        return update + _size(algorithm, {"seed": LARGE, "next_seed": LARGE}) - _size(algorithm, {})
    return _size_of_whole(algorithm, model)


def _size(algorithm: str, values: Mapping[str, Any]) -> int:
    """Bytes of a message; (n, *shape) stands for an array of that shape with n bytes an element."""
    made = {
        name: np.zeros(value[1:], f"u{value[0]}") if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return len(wire.encode(Message(algorithm, "update", wire.NO_DIGEST, 1, values=made)))


def _size_of_whole(algorithm: str, model: Any) -> int:
    """Bytes of a message with all trained parameters, which are not made for it."""
    params = list(trainable(model).values())
    empty = _size(algorithm, {str(index): (1, 0) for index in range(len(params))})
    return empty + sum(
        wire.array_bytes(param.element_size(), [param.numel()]) - wire.array_bytes(1, [0]) for param in params
    )


# ---- memory and disk ----


def memory(config: SimulationConfig, model: Any) -> dict[str, int]:
    """Bytes of a run of all clients in this process, by what they are for, besides the libraries' own.

    model: with its adapter; config: with auto resolved (`adapters.resolve`).
    """
    whole = sum(param.numel() * param.element_size() for param in model.parameters())
    trained = models.trainable_bytes(model)
    parts = {"weights of the server and the clients": 2 * whole, **_copies(config, trained)}
    parts["moments of the server's optimiser, held by both"] = 2 * moments(config, model)
    if config.server.optim != "sgd":
        parts["the mean update, for its step"] = _wide(model)
    evaluated = config.evaluation.max_samples or config.evaluation.per_device_eval_batch_size
    batch = min(evaluated, config.evaluation.per_device_eval_batch_size)
    evaluation = {"activations of a batch in evaluation": activations(config, model, batch, training=False)}
    larger = max(_training(config, model, trained), evaluation, key=lambda phase: sum(phase.values()))
    return {name: size for name, size in {**parts, **larger}.items() if size}


def _training(config: SimulationConfig, model: Any, trained: int) -> dict[str, int]:
    """What a client's steps take beside the weights."""
    batch = config.training.per_device_train_batch_size
    name = "activations of a batch in training"
    if config.algorithm in PUBLISHED:
        return {name: activations(config, model, batch, training=False)}
    kept = {"adam": 2, "adamw": 2}.get(config.training.optim, int(config.training.momentum > 0))
    return {
        "gradients": trained,
        "state of the optimiser": kept * trained,
        name: activations(config, model, batch, training=True),
    }


def _copies(config: SimulationConfig, trained: int) -> dict[str, int]:
    """What is kept of the weights to go back to, and in messages as large as they are."""
    algorithm, in_memory = config.algorithm, config.zeroth_order.snapshot == "memory"
    if algorithm.startswith("fedkseed"):
        return {"the weights to go back to": 3 * trained * in_memory}
    if algorithm in ("decomfl", "feedsign"):
        chosen = with_published(config.zeroth_order, algorithm)
        in_place = chosen.perturbation == "in_place" or chosen.generator == "torch"
        return {"the weights to go back to": trained * (in_memory and (in_place or given(chosen.steps) > 1))}
    if algorithm == "ferret":
        return {"the weights to go back to": trained}
    chosen_clients = max(1, round(config.client_fraction * (clients_of(config) or 1)))
    return {"the weights to go back to": trained, "updates and broadcast": (chosen_clients + 2) * trained}


def activations(config: SimulationConfig, model: Any, batch: int, *, training: bool) -> int:
    """Bytes that a forward pass holds, and a backward pass needs, at the longest records.

    A layer of Llama keeps about 14 vectors of its width and 5 of its MLP's for each token; logits are there
    as the model gives them, and three times in float32 (widened, normalised, their gradient).
    """
    text = model.config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * width
    element = next(model.parameters()).element_size()
    tokens = batch * models.max_length(model, config.dataset.max_length)
    logits: int = tokens * text.vocab_size * (element + (12 if training else 8))
    layer: int = tokens * (14 * width + 5 * inner) * element
    if not training:
        return logits + layer
    if config.training.gradient_checkpointing:
        inputs: int = layers * tokens * width * element
        return logits + layer + inputs
    every: int = layers * layer
    return logits + every


def disk(config: SimulationConfig, model: Any) -> int:
    """Bytes of the run's folder: the model, snapshots, and a ledger of all broadcasts."""
    trained = models.trainable_bytes(model)
    whole: int = sum(param.numel() * param.element_size() for param in model.parameters())
    every = config.ledger.snapshot_every if relayed(config) else 0
    snapshots = min(config.ledger.keep_snapshots + 1, config.rounds // every) if every else 0
    broadcasts = config.rounds * traffic(config, model).broadcast
    return whole + snapshots * (trained + moments(config, model)) + broadcasts


def moments(config: SimulationConfig, model: Any) -> int:
    """Bytes that one party keeps for the server's optimiser."""
    if config.server.plain:
        return 0
    return (1 if config.server.optim == "sgd" else 2) * _wide(model)


def _wide(model: Any) -> int:
    """Bytes of the trained parameters in the dtype that updates are added up in."""
    return sum(param.numel() * max(4, param.element_size()) for param in trainable(model).values())
