"""What torchrun runs on every rank for tests/remote/test_team.py.

    torchrun --standalone --nproc-per-node 2 tests/remote/rank_program.py FOLDER DEVICE [CLIENT_OPTIONS ..]

Trains and projects small models, cut by FSDP2 and whole, and leaves what came of it in FOLDER/rank-N.json;
then goes on as `ferret worker FOLDER/party/socket CLIENT_OPTIONS`. With FERRET_TEST_FAULT=N there is the
latter alone, and rank N fails in training.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path += [str(Path(__file__).parents[1] / "federated"), str(Path(__file__).parents[2])]

from toy import examples, tiny_model

import ferret_ext
from ferret_ext import fsdp
from ferret_ext.federated import digests, sharded
from ferret_ext.federated.admission import Sent
from ferret_ext.federated.algorithms.base import Algorithm, LocalData, Replica
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.algorithms.ferret_reference import FerretReference
from ferret_ext.federated.cli import main
from ferret_ext.federated.client import DivergedError, LocalTrainer
from ferret_ext.federated.config import FerretConfig, TrainingConfig
from ferret_ext.federated.ranks import Ranks
from ferret_ext.federated.server import Server
from ferret_ext.federated.sharded import ShardedTrainer
from ferret_ext.federated.worker import team

TRAINING: dict[str, dict[str, Any]] = {
    "sgd": {},
    "batches of 5 that do not fill the last step": {
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
    },
    "one example a step": {"gradient_accumulation_steps": 1},
    "momentum that is kept": {"momentum": 0.9, "keep_state": True},
    "adam that is kept": {"optim": "adam", "learning_rate": 1e-3, "keep_state": True},
    "clipping": {"max_grad_norm": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
}
FERRET: dict[str, dict[str, Any]] = {
    "float32": {"coordinates": "float32"},
    "choice8": {"allocation": "curvature"},
    "gaussian in blocks of 700": {"basis": "gaussian", "granularity": 700, "coordinates": "int4"},
    "shared-round": {"seeds": "shared-round"},
    "reference-code": {"mode": "reference-code"},
}


def training(ranks: Ranks, dtype: str = "float32", **settings: Any) -> dict[str, float]:
    """Two rounds of a cut model and a whole one: their losses, and how far their updates are apart."""
    config = TrainingConfig(**{"max_steps": 2, "learning_rate": 0.1, **settings})
    models = [tiny_model(dtype=getattr(torch, dtype)).to(ranks.device) for _ in range(2)]
    first = [param.detach().clone() for param in models[0].parameters()]
    ranks.cut(models[1])
    places = [part.data_ptr() for part in fsdp.local(list(models[1].parameters()))]
    losses = []
    for model, kind in zip(models, (LocalTrainer, ShardedTrainer), strict=True):
        trainer = kind(config, 0)
        losses.append(sum(trainer.train(model, examples(), seed=5 + round_) for round_ in range(2)))
    assert places == [part.data_ptr() for part in fsdp.local(list(models[1].parameters()))]
    whole = [param.detach() for param in models[0].parameters()]
    together = list(fsdp.whole(list(models[1].parameters())))
    apart, update = (flat(a) - flat(b) for a, b in ((together, whole), (first, whole)))
    return {"losses": losses, "error": float(apart.norm() / update.norm())}


def divergence(ranks: Ranks) -> dict[str, Any]:
    """What is said of it, and the losses of a whole model and of one that was taken back after it."""
    model = tiny_model().to(ranks.device)
    ranks.cut(model)
    parts = fsdp.local(list(model.parameters()))
    first = [part.clone() for part in parts]
    said = ""
    try:
        ShardedTrainer(TrainingConfig(learning_rate=1e30), 0).train(model, examples(), seed=5)
    except DivergedError as error:
        said = str(error)
    torch._foreach_copy_(parts, first)
    config = TrainingConfig(max_steps=2, learning_rate=0.1)
    whole = LocalTrainer(config, 0).train(tiny_model().to(ranks.device), examples(), seed=5)
    return {"said": said, "losses": [whole, ShardedTrainer(config, 0).train(model, examples(), seed=5)]}


def projection(ranks: Ranks, granularity: Any, *layers: nn.Linear) -> dict[str, Any]:
    """The coordinates of linear layers, rebuilt from them, and digests."""
    model = nn.Sequential(*layers).to(ranks.device)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.normal_(generator=torch.Generator(ranks.device).manual_seed(index))
    whole = [param.detach().clone() for param in model.parameters()]
    ranks.cut(model)
    params = list(model.parameters())
    plan = ferret_ext.BlockPlan.from_parameters(model.named_parameters(), 64, granularity=granularity)
    shard, parts = plan.shard(fsdp.ranges(params)), fsdp.local(params)
    zeros = [torch.zeros_like(part) for part in parts]
    gammas = fsdp.total(ferret_ext.project_difference(shard, parts, zeros, 9), params)
    expected = ferret_ext.project_difference(plan, whole, [torch.zeros_like(param) for param in whole], 9)
    ferret_ext.apply_(shard, parts, [(9, gammas, 1.0)], 0.5)
    ferret_ext.apply_(plan, whole, [(9, gammas, 1.0)], 0.5)
    return {
        "error": float((gammas - expected).norm() / expected.norm()),
        "empty": min(part.numel() for part in parts),
        "same bits": all(map(torch.equal, list(fsdp.whole(params)), whole)),
        "same digests": digests.of_each_cut(params) == digests.of_each(whole),
        "gammas": gammas.tolist(),
    }


def rounds(ranks: Ranks, **settings: Any) -> dict[str, Any]:
    """Three rounds of one client that is cut; its messages, and the coordinates beside a whole model's."""
    config = FerretConfig(**{"K": 48, "server_warmup": 2, **settings})
    training = TrainingConfig(max_steps=1, learning_rate=0.1)
    algorithm = algorithm_of(config, ShardedTrainer(training, 0))
    server: Server[Any] = Server(algorithm, tiny_model().to(ranks.device), [0], 1.0, 0, run=b"together")
    model = tiny_model().to(ranks.device)
    ranks.cut(model)
    replica = algorithm.replicate(model)
    payloads, errors = [], []
    for round_ in (1, 2, 3):
        data = LocalData(0, round_, 17 + round_, examples())
        reply = algorithm.client_update(replica, data, server.broadcasts_since(round_ - 1))
        assert not reply.failure, reply.failure
        errors.append(projected_whole(replica))
        _, rejected = server.apply([0], [Sent(0, reply.payload)])
        assert not rejected
        payloads.append(reply.payload.hex())
    algorithm.client_update(replica, LocalData(0, 4, 21, examples()), server.broadcasts_since(3))
    return {
        "payloads": payloads,
        "errors": errors,
        "weights": [replica.weights.hex(), server.replica.weights.hex()],
    }


def algorithm_of(config: FerretConfig, trainer: LocalTrainer) -> Algorithm[Any]:
    if config.mode == "reference-code":
        return FerretReference(config, 0.5, trainer.train, 3, 7)
    if config.seeds == "shared-round":
        return SharedFerret(config, 0.5, trainer.train, 7)
    return Ferret(config, 0.5, trainer.train)


def projected_whole(replica: Replica) -> float:
    """How far the ranks' sum of coordinates is from the whole update's, relative to these."""
    plan: ferret_ext.BlockPlan = replica.plan  # type: ignore[attr-defined]
    new = list(fsdp.whole(replica.cut))
    with torch.no_grad():
        for param, start in zip(replica.params, replica.start, strict=True):
            param.copy_(start)
    old = list(fsdp.whole(replica.cut))
    expected = ferret_ext.project_difference(plan, old, new, 23)
    with torch.no_grad():
        for (start, stop), param, whole in zip(fsdp.ranges(replica.cut), replica.params, new, strict=True):
            param.copy_(whole.reshape(-1)[start:stop].view(param.shape))
    got = replica.project(replica.part, 23, "rademacher")  # type: ignore[attr-defined]
    return float((got - expected).norm() / expected.norm())


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def results(ranks: Ranks) -> Iterator[tuple[str, Any]]:
    for name, settings in TRAINING.items():
        yield f"training: {name}", training(ranks, **settings)
    yield "divergence", divergence(ranks)
    layers = nn.Linear(512, 257, bias=False), nn.Linear(256, 512, bias=False)
    yield "projection: in whole tiles", projection(ranks, "tensor", *layers)
    layers = nn.Linear(37, 41), nn.Linear(41, 1)
    yield "projection: tiles are cut, and rank 1 lacks a parameter", projection(ranks, 1024, *layers)
    for name, settings in FERRET.items():
        yield f"rounds: {name}", rounds(ranks, **settings)


def fail() -> None:
    """As a rank that lacks memory, and is soon given up."""

    def backward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    sharded.ShardedTrainer._backward = backward  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    folder, device, *options = sys.argv[1:]
    torch.set_num_threads(1)
    fault = os.environ.get("FERRET_TEST_FAULT")
    team.PATIENCE = 2.0 if fault else 900.0  # ranks of a busy machine may come to the same error far apart
    if fault is None:
        joined = Ranks.join(device)
        found = dict(results(joined))
        Path(folder, f"rank-{joined.rank}.json").write_text(json.dumps(found))
        Ranks.join = lambda device: joined  # type: ignore[method-assign]  # who meets twice finds stale addresses
    elif fault == os.environ["RANK"]:
        fail()
    if options:
        raise SystemExit(main(["worker", f"{folder}/party/socket", *options, f"device={device}"]))
    dist.destroy_process_group()
