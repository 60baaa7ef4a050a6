"""Federated algorithms, one a module; each knows only `base` and the pieces that it names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ferret_ext.federated import adapters
from ferret_ext.federated.algorithms.base import Algorithm, Train
from ferret_ext.federated.algorithms.fedavg import FedAvg, FedOpt
from ferret_ext.federated.algorithms.fedkseed import FedKSeed, FedKSeedPro
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.algorithms.ferret_reference import FerretReference
from ferret_ext.federated.algorithms.scalar_rounds import DeComFL, FeedSign
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.privacy import ClientSide
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.zeroth_order import PUBLISHED, ZerothOrderTrainer, batch_loss, with_published

SEEDED: dict[str, type[FedKSeed] | type[DeComFL]] = {
    kind.name: kind for kind in (FedKSeed, FedKSeedPro, DeComFL, FeedSign)
}


def create(config: SimulationConfig, trainer: LocalTrainer) -> Algorithm[Any]:
    """The algorithm that `config.algorithm` names, around the clients' local training."""
    train = trainer.train
    makers: dict[str, Callable[[], Algorithm[Any]]] = {
        "ferret": lambda: _ferret(config, train),
        **{name: partial(_fedavg, config, train, name) for name in ("fedavg", *adapters.PUBLISHED)},
        **dict.fromkeys(PUBLISHED, partial(_zeroth_order, config, trainer)),
    }
    return makers[config.algorithm]()


def notes(config: SimulationConfig) -> list[str]:
    """What the log says of the settings that an algorithm takes or leaves."""
    if config.algorithm not in PUBLISHED:
        return []
    chosen = with_published(config.zeroth_order, config.algorithm)
    return [
        f"{config.algorithm}: {chosen.steps} steps a round, {chosen.perturbations} directions a step, "
        f"learning rate {chosen.learning_rate:g}, eps {chosen.eps:g} (zeroth_order.*); of training.* nothing "
        "but per_device_train_batch_size counts"
    ]


def _ferret(config: SimulationConfig, train: Train) -> Algorithm[Any]:
    chosen, step, seed = config.ferret, config.server_learning_rate, config.seed
    more: dict[str, Any] = {"privacy": _client_side(config), "server": config.server}
    if chosen.mode == "reference-code":
        return FerretReference(chosen, step, train, config.rounds, derive(seed, "pool"))
    if chosen.secure_aggregation:
        from ferret_ext.federated.secure.ferret import SecureFerret  # which stands on this package

        return SecureFerret(chosen, step, train, derive(seed, "bases"), **more)
    if chosen.seeds == "shared-round":
        return SharedFerret(chosen, step, train, derive(seed, "bases"), **more)
    return Ferret(chosen, step, train, **more)


def _fedavg(config: SimulationConfig, train: Train, name: str) -> Algorithm[Any]:
    rate, privacy = config.server_learning_rate, _client_side(config)
    if config.server.plain:
        return FedAvg(rate, train, name, privacy)
    return FedOpt(rate, train, name, privacy, server=config.server)


def _client_side(config: SimulationConfig) -> ClientSide | None:
    """What privacy asks of clients."""
    private = config.privacy.noise != "none"
    return ClientSide(config.privacy, config.robust.quorum) if private else None


def _zeroth_order(config: SimulationConfig, trainer: LocalTrainer) -> Algorithm[Any]:
    """An algorithm that looks at losses alone. FedZO is federated averaging of zeroth-order steps."""
    name, rate = config.algorithm, config.server_learning_rate
    settings = with_published(config.zeroth_order, name)
    loss = partial(batch_loss, pad_token_id=trainer.pad_token_id)
    batch_size = trainer.config.per_device_train_batch_size
    if name == "fedzo":
        return _fedavg(config, ZerothOrderTrainer(settings, loss, batch_size).train, name)
    return SEEDED[name](settings, rate, derive(config.seed, "directions"), loss, batch_size)
